// Stands in for libnvidia-ml.so.1: what PyTorch, fitune and nvidia-ml-py ask the driver about cards and processes.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "api.h"
#include "cards.h"
#include "processes.h"

namespace {

enum { DONE = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

constexpr unsigned NO_INSTANCE = ~0u;  // of a card that is not divided (MIG)

// As nvml.h lays them out.
struct ProcessInfo {
    unsigned pid;
    unsigned long long used_bytes;
    unsigned gpu_instance, compute_instance;
};

struct FirstProcessInfo {
    unsigned pid;
    unsigned long long used_bytes;
};

struct MemoryInfo {
    unsigned long long total, free, used;
};

struct SecondMemoryInfo {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

// A card's handle is its index and one: null is no handle.
int index_of(void* handle) { return static_cast<int>(reinterpret_cast<uintptr_t>(handle)) - 1; }
void* handle_of(int index) { return reinterpret_cast<void*>(static_cast<uintptr_t>(index + 1)); }

ProcessTable* table() {
    static ProcessTable* opened = open_process_table();
    return opened;
}

uint64_t used_bytes(int device) { return table() ? used_by_others(*table(), -1, device) : 0; }

// What the driver keeps for itself, which CUDA does not show.
uint64_t kept_bytes() { return chosen_card().box_bytes - chosen_card().visible_bytes; }

std::string uuid_text(int device) {
    std::string text = "GPU-";
    char two[3];
    int place = 0;
    for (unsigned char byte : uuid_of_card(device)) {
        snprintf(two, sizeof two, "%02x", byte);
        text += two;
        if (place == 3 || place == 5 || place == 7 || place == 9) text += '-';
        place++;
    }
    return text;
}

int list_processes(void* handle, unsigned* number, ProcessInfo* found) {
    unsigned room = *number, seen = 0;
    int device = index_of(handle);
    for (int i = 0; table() && i < MOST_PROCESSES; i++) {
        ProcessSlot& slot = table()->slots[i];
        if (!slot.pid || !slot.used_bytes[device] || !is_alive(slot.pid)) continue;
        if (seen < room && found)
            found[seen] = {static_cast<unsigned>(slot.pid), slot.used_bytes[device], NO_INSTANCE, NO_INSTANCE};
        seen++;
    }
    *number = seen;
    return seen > room ? INSUFFICIENT_SIZE : DONE;
}

}  // namespace

API int nvmlInit() { return DONE; }
API int nvmlInit_v2() { return DONE; }
API int nvmlInitWithFlags(unsigned) { return DONE; }
API int nvmlShutdown() { return DONE; }

API const char* nvmlErrorString(int error) {
    switch (error) {
        case NOT_SUPPORTED: return "Not Supported";
        case NOT_FOUND: return "Not Found";
        case INSUFFICIENT_SIZE: return "Insufficient Size";
        default: return "an error of NVML in a rehearsal";
    }
}

API int nvmlSystemGetDriverVersion(char* text, unsigned length) {
    snprintf(text, length, "%s", DRIVER_VERSION);
    return DONE;
}

API int nvmlSystemGetNVMLVersion(char* text, unsigned length) {
    snprintf(text, length, "13.%s", DRIVER_VERSION);
    return DONE;
}

API int nvmlSystemGetCudaDriverVersion_v2(int* version) {
    *version = CUDA_VERSION_OF_DRIVER;
    return DONE;
}

API int nvmlSystemGetCudaDriverVersion(int* version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

// ---- which cards there are ----

API int nvmlDeviceGetCount_v2(unsigned* number) {
    *number = number_of_cards();
    return DONE;
}

API int nvmlDeviceGetCount(unsigned* number) { return nvmlDeviceGetCount_v2(number); }

API int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) {
    if (static_cast<int>(index) >= number_of_cards()) return INVALID_ARGUMENT;
    *handle = handle_of(static_cast<int>(index));
    return DONE;
}

API int nvmlDeviceGetHandleByIndex(unsigned index, void** handle) {
    return nvmlDeviceGetHandleByIndex_v2(index, handle);
}

API int nvmlDeviceGetHandleByPciBusId_v2(const char* text, void** handle) {
    unsigned domain = 0, bus = 1;  // cudaDeviceGetPCIBusId says index + 1 for the bus
    sscanf(text, "%x:%x", &domain, &bus);
    *handle = handle_of(static_cast<int>(bus) - 1);
    return DONE;
}

API int nvmlDeviceGetUUID(void* handle, char* text, unsigned length) {
    snprintf(text, length, "%s", uuid_text(index_of(handle)).c_str());
    return DONE;
}

API int nvmlDeviceGetHandleByUUID(const char* text, void** handle) {
    for (int device = 0; device < number_of_cards(); device++)
        if (uuid_text(device) == text) {
            *handle = handle_of(device);
            return DONE;
        }
    return NOT_FOUND;
}

API int nvmlDeviceGetIndex(void* handle, unsigned* index) {
    *index = index_of(handle);
    return DONE;
}

API int nvmlDeviceGetName(void*, char* text, unsigned length) {
    snprintf(text, length, "%s", chosen_card().name);
    return DONE;
}

API int nvmlDeviceGetCudaComputeCapability(void*, int* major, int* minor) {
    *major = chosen_card().major;
    *minor = chosen_card().minor;
    return DONE;
}

// ---- memory and processes ----

API int nvmlDeviceGetMemoryInfo(void* handle, MemoryInfo* memory) {
    memory->total = memory_of_card() + kept_bytes();
    memory->used = used_bytes(index_of(handle)) + kept_bytes();
    memory->free = memory->total - memory->used;
    return DONE;
}

API int nvmlDeviceGetMemoryInfo_v2(void* handle, SecondMemoryInfo* memory) {
    memory->total = memory_of_card() + kept_bytes();
    memory->reserved = kept_bytes();
    memory->used = used_bytes(index_of(handle));
    memory->free = memory_of_card() - memory->used;
    return DONE;
}

API int nvmlDeviceGetComputeRunningProcesses_v3(void* handle, unsigned* number, ProcessInfo* found) {
    return list_processes(handle, number, found);
}

API int nvmlDeviceGetComputeRunningProcesses_v2(void* handle, unsigned* number, ProcessInfo* found) {
    return list_processes(handle, number, found);
}

API int nvmlDeviceGetComputeRunningProcesses(void* handle, unsigned* number, FirstProcessInfo* found) {
    ProcessInfo processes[MOST_PROCESSES];
    unsigned room = *number;
    *number = MOST_PROCESSES;
    list_processes(handle, number, processes);
    if (*number > room) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < *number; i++) found[i] = {processes[i].pid, processes[i].used_bytes};
    return DONE;
}

API int nvmlDeviceGetGraphicsRunningProcesses_v3(void*, unsigned* number, ProcessInfo*) {
    *number = 0;
    return DONE;
}

API int nvmlDeviceGetGraphicsRunningProcesses_v2(void*, unsigned* number, ProcessInfo*) {
    *number = 0;
    return DONE;
}

// ---- sensors: values of a card that works ----

API int nvmlDeviceGetUtilizationRates(void*, unsigned* rates) {
    rates[0] = 87;  // per cent of the time with a kernel
    rates[1] = 41;  // with the memory in use
    return DONE;
}

API int nvmlDeviceGetPowerUsage(void*, unsigned* milliwatts) {
    *milliwatts = 287650;
    return DONE;
}

API int nvmlDeviceGetTemperature(void*, int, unsigned* celsius) {
    *celsius = 63;
    return DONE;
}

API int nvmlDeviceGetTemperatureV(void*, void* asked) {
    static_cast<int*>(asked)[2] = 63;  // behind a version and the sensor
    return DONE;
}

API int nvmlDeviceGetClockInfo(void*, int, unsigned* megahertz) {
    *megahertz = 2520;
    return DONE;
}

API int nvmlDeviceGetCurrentClocksEventReasons(void*, unsigned long long* reasons) {
    *reasons = number_from_environment("FAKE_NVML_THROTTLE", 0);
    return DONE;
}

API int nvmlDeviceGetCurrentClocksThrottleReasons(void* handle, unsigned long long* reasons) {
    return nvmlDeviceGetCurrentClocksEventReasons(handle, reasons);
}

// ---- what such cards do not have ----

API int nvmlDeviceGetMigMode(void*, unsigned*, unsigned*) { return NOT_SUPPORTED; }
API int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, int*) { return NOT_SUPPORTED; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return NOT_SUPPORTED; }
API int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return NOT_SUPPORTED; }

API int nvmlDeviceGetP2PStatus(void*, void*, int, int* status) {
    *status = 1;  // the chipset does not support it
    return DONE;
}
