// Launches of kernels. The wheel registers each kernel with its name and launches it by the address of a function of
// the host; here it is counted and not run, but for those that fill a tensor: PyTorch's zeros and ones are looked at
// by code on the host (a mask, a counter of steps), and filling needs no more than a pointer and a value.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <unordered_map>
#include <utility>
#include <vector>

#include "api.h"
#include "card_memory.h"
#include "counters.h"
#include "runtime.h"

// ---- counters
// --------------------------------------------------------------------------------------------------------

namespace {
std::atomic<size_t> counters[NUM_COUNTED];

using Hook = void (*)(int counted, const void* what);
std::atomic<Hook> hook{nullptr};
}  // namespace

void count(Counted counted, const void* what, size_t amount) {
    counters[counted] += amount;
    if (Hook wanted = hook.load(std::memory_order_relaxed)) wanted(counted, what);
}

API void rehearsal_counters(size_t* values) { std::copy(counters, counters + NUM_COUNTED, values); }

// Told of everything that is counted, while it happens; null for nobody.
API void rehearsal_set_hook(Hook wanted) { hook = wanted; }

// ---- registration
// ----------------------------------------------------------------------------------------------------

namespace {

// By the address that a launch names.
std::unordered_map<const void*, const char*>& kernel_names() {
    static auto* names = new std::unordered_map<const void*, const char*>;
    return *names;
}

std::unordered_map<const void*, size_t> launches;

struct LaunchConfiguration {
    dim3 grid, block;
    size_t shared_memory;
    cudaStream_t stream;
};

// A launch in C++ (<<<...>>>) leaves its configuration with one call and takes it back with another.
thread_local std::vector<LaunchConfiguration> pending;

}  // namespace

API void** __cudaRegisterFatBinary(void*) {
    static void* handle[4];
    return handle;
}

API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}
API void __cudaInitModule(void**) {}

API void __cudaRegisterFunction(void**, const char* host_address, char*, const char* name, int, uint3*, uint3*, dim3*,
                                dim3*, int*) {
    Guard guard(lock);
    kernel_names()[host_address] = name;
}

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, cudaStream_t stream) {
    pending.push_back({grid, block, shared_memory, stream});
    return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory, void* stream) {
    LaunchConfiguration last = pending.back();
    pending.pop_back();
    *grid = last.grid;
    *block = last.block;
    *shared_memory = last.shared_memory;
    *static_cast<cudaStream_t*>(stream) = last.stream;
    return cudaSuccess;
}

// ---- fills
// -----------------------------------------------------------------------------------------------------------

namespace {

// Bytes of an element of a type by its name as the compiler mangles it; 0 for one that is not known.
size_t element_bytes(const char* mangled) {
    if (!strncmp(mangled, "N3c108BFloat16E", 15) || !strncmp(mangled, "N3c104HalfE", 11)) return 2;
    switch (*mangled) {
        case 'b':  // bool
        case 'h':  // unsigned char
        case 'a':  // signed char
            return 1;
        case 's': return 2;  // short
        case 'f':            // float
        case 'i':            // int
        case 'j':            // unsigned
            return 4;
        case 'd':  // double
        case 'l':  // long
        case 'm':  // unsigned long
            return 8;
        default: return 0;
    }
}

// Does what vectorized_elementwise_kernel and unrolled_elementwise_kernel do with a FillFunctor: their arguments are
// the number of elements, the functor, which holds the value, and the array of pointers, here the output alone.
void run_fill(const char* name, void** arguments) {
    constexpr const char* FUNCTOR = "FillFunctorI";
    if (!strstr(name, "vectorized_elementwise_kernel") && !strstr(name, "unrolled_elementwise_kernel")) return;
    const char* functor = strstr(name, FUNCTOR);
    if (!functor || !arguments || strstr(name, "multi_tensor")) return;
    size_t width = element_bytes(functor + strlen(FUNCTOR));
    int number = *static_cast<int*>(arguments[0]);
    auto* value = static_cast<const char*>(arguments[1]);
    char* output = *static_cast<char**>(arguments[2]);
    if (!width || number <= 0 || !find_region(output) || number * width > most_copied_bytes()) return;
    bool same_bytes = std::all_of(value, value + width, [&](char byte) { return byte == value[0]; });
    if (same_bytes) {
        fill_bytes(output, value[0], number * width);
        return;
    }
    for (int i = 0; i < number; i++) memcpy(output + i * width, value, width);
}

// A grid that a card would refuse is refused: PyTorch's own code has to have kept to the limits.
bool is_valid(dim3 grid, dim3 block) {
    bool empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
    return !empty && block.x * block.y * block.z <= 1024 && grid.y <= 65535 && grid.z <= 65535;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments) {
    static const bool fills = number_from_environment("FAKE_FILL", 1);
    count(KERNEL, function);
    Guard guard(lock);
    if (!ensure_context(current_device())) return note_error(cudaErrorMemoryAllocation);
    launches[function]++;
    if (!is_valid(grid, block)) return note_error(cudaErrorInvalidConfiguration);
    auto named = kernel_names().find(function);
    if (fills && named != kernel_names().end()) run_fill(named->second, arguments);
    return cudaSuccess;
}

}  // namespace

// ---- launches
// --------------------------------------------------------------------------------------------------------

API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
    TRACE();
    return launch(function, grid, block, arguments);
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
    TRACE();
    return launch(kernel, grid, block, arguments);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function, void** arguments) {
    TRACE();
    return launch(function, configuration->gridDim, configuration->blockDim, arguments);
}

API cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t,
                                            cudaStream_t) {
    TRACE();
    return launch(function, grid, block, arguments);
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    fprintf(stderr, "[rehearsal] CUDA graphs are not supported\n");
    return note_error(cudaErrorNotSupported);
}

// A kernel's handle is the address that it is launched by.
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}

API cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* function) { return __cudaGetKernel(kernel, function); }

API cudaError_t cudaGetFuncBySymbol(cudaFunction_t* found, const void* function) {
    *found = static_cast<cudaFunction_t>(const_cast<void*>(function));
    return cudaSuccess;
}

// ---- what a kernel needs: PyTorch asks before it chooses a kernel or the size of a grid
// ------------------------------

API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
    TRACE();
    bool too_much =
        attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > chosen_card().shared_memory_per_block;
    return too_much ? note_error(cudaErrorInvalidValue) : cudaSuccess;
}

API cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    TRACE();
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;  // a guess: the machine code that would tell it is not read
    attributes->maxDynamicSharedSizeBytes = 49152;
    attributes->binaryVersion = attributes->ptxVersion = chosen_card().binary_version;
    return cudaSuccess;
}

static int blocks_at_once(int block_threads, size_t shared_memory) {
    const Card& card = chosen_card();
    int most = card.blocks_per_multiprocessor;
    if (block_threads) most = std::min(most, card.threads_per_multiprocessor / block_threads);
    if (shared_memory) {
        size_t of_a_block = shared_memory + 1024;  // what the driver reserves
        most = std::min<int>(most, card.shared_memory_per_multiprocessor / of_a_block);
    }
    return std::max(most, 1);
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* number, const void*, int threads, size_t shared) {
    TRACE();
    *number = blocks_at_once(threads, shared);
    return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* number, const void* function, int threads,
                                                                       size_t shared, unsigned) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(number, function, threads, shared);
}

API cudaError_t cudaOccupancyMaxActiveClusters(int* number, const void*, const cudaLaunchConfig_t*) {
    *number = chosen_card().multiprocessors / 2;
    return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxPotentialClusterSize(int* number, const void*, const cudaLaunchConfig_t*) {
    *number = 8;
    return cudaSuccess;
}

// ---- what was launched: "count<TAB>mangled name" a line, most first
// --------------------------------------------------

API void rehearsal_write_kernels(const char* path) {
    Guard guard(lock);
    FILE* file = fopen(path, "w");
    if (!file) return;
    std::vector<std::pair<size_t, const void*>> most_first;
    for (auto& [function, number] : launches) most_first.emplace_back(number, function);
    std::sort(most_first.rbegin(), most_first.rend());
    for (auto& [number, function] : most_first) {
        auto named = kernel_names().find(function);
        fprintf(file, "%zu\t%s\n", number, named == kernel_names().end() ? "?" : named->second);
    }
    fclose(file);
}

namespace {
struct AtExit {
    ~AtExit() {
        if (const char* path = getenv("FAKE_CUDA_KERNELS")) rehearsal_write_kernels(path);
    }
} at_exit;
}  // namespace
