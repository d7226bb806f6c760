// Names what launches: for each launch the operator that is computed and the kind of module that it belongs to, as
// PyTorch's own observers tell them. In the backward the module is that of the forward operator whose gradient is
// computed, found by autograd's sequence number.
#include <ATen/record_function.h>
#include <dlfcn.h>

#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

struct Operator {
    std::string name;
    int64_t sequence_number;  // negative where autograd gave it none
};

// As in driver/counters.h: what is named is what the card begins, and where the host waits.
constexpr int LAST_NAMED = 10;
constexpr const char* KINDS[] = {"kernel",      "matrix product", "library call", "triton kernel",
                                 "memset",      "copy to card",   "copy to host", "copy on card",
                                 "stream wait", "device wait",    "event wait"};
constexpr const char* AUTOGRAD = "autograd::engine::evaluate_function: ";

std::mutex lock;
thread_local std::vector<Operator> running;  // the innermost is last
thread_local std::string module_of_thread;
std::unordered_map<int64_t, std::string> module_of_sequence;
std::map<std::string, size_t> launches;
at::CallbackHandle handle;

bool begins_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }

// "module<TAB>outermost operator<TAB>innermost operator"
std::string place() {
    if (running.empty()) return (module_of_thread.empty() ? "-" : module_of_thread) + "\t-\t-";
    std::string outermost = running.front().name, innermost = running.back().name, module = module_of_thread;
    if (begins_with(outermost, AUTOGRAD)) {
        outermost = outermost.substr(std::string(AUTOGRAD).size());
        module.clear();
        for (const Operator& each : running) {
            if (each.sequence_number < 0) continue;
            auto found = module_of_sequence.find(each.sequence_number);
            if (found != module_of_sequence.end()) module = found->second;
            break;
        }
        module = "backward of " + (module.empty() ? "-" : module);
    }
    return (module.empty() ? "-" : module) + "\t" + outermost + "\t" + innermost;
}

void on_launch(int counted, const void*) {
    if (counted > LAST_NAMED) return;
    std::lock_guard<std::mutex> guard(lock);
    launches[std::string(KINDS[counted]) + "\t" + place()]++;
}

std::unique_ptr<at::ObserverContext> on_begin(const at::RecordFunction& function) {
    running.push_back({function.name(), function.seqNr()});
    bool is_forward = function.scope() == at::RecordScope::FUNCTION && !begins_with(function.name(), "autograd::");
    if (is_forward && function.seqNr() >= 0 && !module_of_thread.empty()) {
        std::lock_guard<std::mutex> guard(lock);
        module_of_sequence[function.seqNr()] = module_of_thread;
    }
    return nullptr;
}

void on_end(const at::RecordFunction&, at::ObserverContext*) {
    if (!running.empty()) running.pop_back();
}

void set_hook(void (*hook)(int, const void*)) {
    auto set = reinterpret_cast<void (*)(void (*)(int, const void*))>(dlsym(RTLD_DEFAULT, "rehearsal_set_hook"));
    set(hook);
}

}  // namespace

// The module that this thread is in; empty for none.
API void operators_enter(const char* module) { module_of_thread = module; }

API void operators_begin() {
    auto callback = at::RecordFunctionCallback(on_begin, on_end);
    handle = at::addGlobalCallback(callback.scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION}));
    set_hook(on_launch);
}

// Writes "number<TAB>kind<TAB>module<TAB>outermost operator<TAB>innermost operator" a line.
API void operators_end(const char* path) {
    set_hook(nullptr);
    at::removeCallback(handle);
    FILE* file = fopen(path, "w");
    if (!file) return;
    for (const auto& [what, number] : launches) fprintf(file, "%zu\t%s\n", number, what.c_str());
    fclose(file);
}
