// Stands in for libcudart, which PyTorch's wheel links to: cards, memory, streams and events. Loaded by LD_PRELOAD, so
// that these functions are found before the genuine ones. Everything on a stream is done at once and therefore
// complete when it is asked for.
#include <cuda_runtime_api.h>

#include <sys/mman.h>
#include <utility>
#include <cstring>
#include <ctime>

#include "api.h"
#include "card_memory.h"
#include "cards.h"
#include "counters.h"
#include "driver_entries.h"
#include "runtime.h"

// ---- errors: cudaGetLastError gives the last failure of the thread and forgets it -----------------------------------

namespace {
thread_local cudaError_t last_error = cudaSuccess;

// A device needs its context before anything is done with it; the memory for it may be lacking.
cudaError_t with_context() {
    return ensure_context(current_device()) ? cudaSuccess : note_error(cudaErrorMemoryAllocation);
}
}  // namespace

cudaError_t note_error(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

API cudaError_t cudaGetLastError() {
    TRACE();
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

API cudaError_t cudaPeekAtLastError() { return last_error; }

API const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorNotSupported: return "operation not supported";
        default: return "unknown error of the rehearsal";
    }
}

API const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorNotSupported: return "cudaErrorNotSupported";
        default: return "cudaErrorUnknown";
    }
}

// ---- cards
// -----------------------------------------------------------------------------------------------------------

API cudaError_t cudaGetDeviceCount(int* number) {
    TRACE();
    *number = number_of_cards();
    return *number ? cudaSuccess : note_error(cudaErrorNoDevice);
}

API cudaError_t cudaGetDevice(int* device) {
    *device = current_device();
    return cudaSuccess;
}

API cudaError_t cudaSetDevice(int device) {
    TRACE();
    return set_current_device(device) ? with_context() : note_error(cudaErrorInvalidDevice);
}

API cudaError_t cudaInitDevice(int device, unsigned, unsigned) { return cudaSetDevice(device); }
API cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceReset() { return cudaSuccess; }
API cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }

API cudaError_t cudaGetDeviceFlags(unsigned* flags) {
    *flags = 0;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit) {
    *value = 1024;
    return cudaSuccess;
}

API cudaError_t cudaDeviceSynchronize() {
    TRACE();
    count(DEVICE_SYNCHRONISATION);
    return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDA_VERSION_OF_DRIVER;
    return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
    if (lowest) *lowest = 0;
    if (highest) *highest = -5;
    return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;  // copies between cards go over the host, as on most machines with several GeForce cards
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetByPCIBusId(int* device, const char* text) {
    unsigned domain = 0, bus = 1;
    sscanf(text, "%x:%x", &domain, &bus);
    *device = static_cast<int>(bus) - 1;
    return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    TRACE();
    if (device < 0 || device >= number_of_cards()) return note_error(cudaErrorInvalidDevice);
    const Card& card = chosen_card();
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, card.name);
    memcpy(properties->uuid.bytes, uuid_of_card(device).data(), 16);
    properties->major = card.major;
    properties->minor = card.minor;
    properties->totalGlobalMem = total_bytes();
    properties->totalConstMem = 65536;
    properties->l2CacheSize = card.l2_cache_bytes;
    properties->memoryBusWidth = card.memory_bus_bits;
    properties->multiProcessorCount = card.multiprocessors;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = card.threads_per_multiprocessor;
    properties->maxBlocksPerMultiProcessor = card.blocks_per_multiprocessor;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->sharedMemPerBlock = 49152;
    properties->sharedMemPerBlockOptin = card.shared_memory_per_block;
    properties->sharedMemPerMultiprocessor = card.shared_memory_per_multiprocessor;
    properties->reservedSharedMemPerBlock = 1024;
    properties->textureAlignment = 512;
    properties->asyncEngineCount = 2;
    properties->pciBusID = device + 1;
    properties->unifiedAddressing = properties->managedMemory = properties->concurrentManagedAccess = 1;
    properties->concurrentKernels = properties->cooperativeLaunch = properties->canMapHostMemory = 1;
    properties->computePreemptionSupported = properties->memoryPoolsSupported = 1;
    return cudaSuccess;
}

int attribute_of_card(cudaDeviceAttr attribute) {
    const Card& card = chosen_card();
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: return card.major;
        case cudaDevAttrComputeCapabilityMinor: return card.minor;
        case cudaDevAttrMultiProcessorCount: return card.multiprocessors;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return card.threads_per_multiprocessor;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return card.blocks_per_multiprocessor;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return card.shared_memory_per_block;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return card.shared_memory_per_multiprocessor;
        case cudaDevAttrL2CacheSize: return card.l2_cache_bytes;
        case cudaDevAttrGlobalMemoryBusWidth: return card.memory_bus_bits;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxThreadsPerBlock:
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY:
        case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor:
        case cudaDevAttrTotalConstantMemory: return 65536;
        case cudaDevAttrClockRate: return 2000000;
        case cudaDevAttrMemoryClockRate: return 10000000;
        case cudaDevAttrPciBusId:
        case cudaDevAttrCooperativeLaunch:
        case cudaDevAttrUnifiedAddressing:
        case cudaDevAttrConcurrentKernels:
        case cudaDevAttrManagedMemory:
        case cudaDevAttrConcurrentManagedAccess:
        case cudaDevAttrMemoryPoolsSupported:
        case cudaDevAttrCanMapHostMemory:
        case cudaDevAttrHostRegisterSupported:
        case cudaDevAttrCanUseHostPointerForRegisteredMem:
        case cudaDevAttrComputePreemptionSupported:
        case cudaDevAttrStreamPrioritiesSupported: return 1;
        default: return 0;
    }
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    TRACE();
    *value = attribute_of_card(attribute);
    return cudaSuccess;
}

// ---- memory
// ----------------------------------------------------------------------------------------------------------

API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    TRACE();
    count(MEMORY_QUERY);
    if (cudaError_t error = with_context()) return error;
    *total = total_bytes();
    *free = free_bytes(current_device());
    return cudaSuccess;
}

API cudaError_t cudaMalloc(void** address, size_t num_bytes) {
    TRACE();
    count(MALLOC);
    Guard guard(lock);
    if (cudaError_t error = with_context()) return error;
    *address = nullptr;
    if (num_bytes == 0) return cudaSuccess;
    size_t taken = round_up(num_bytes);
    int device = current_device();
    if (!take_bytes(device, taken)) return note_error(cudaErrorMemoryAllocation);
    *address = reinterpret_cast<void*>(reserve_addresses(taken, GRANULARITY, PROT_READ | PROT_WRITE, device));
    if (*address) return cudaSuccess;
    give_bytes(device, taken);
    fprintf(stderr, "[rehearsal] the host has no address space for %zu bytes\n", taken);
    return note_error(cudaErrorMemoryAllocation);
}

API cudaError_t cudaFree(void* address) {
    TRACE();
    Guard guard(lock);
    if (!address) return with_context();  // how programs ask for the context
    count(FREE);
    const Region* region = find_region(address);
    if (!region || region->address != reinterpret_cast<uint64_t>(address)) return note_error(cudaErrorInvalidValue);
    give_bytes(region->device, region->num_bytes);
    release_addresses(region->address, region->num_bytes);
    return cudaSuccess;
}

API cudaError_t cudaMallocAsync(void** address, size_t num_bytes, cudaStream_t) {
    return cudaMalloc(address, num_bytes);
}
API cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }

API cudaError_t cudaMallocManaged(void** address, size_t num_bytes, unsigned) {
    TRACE();
    return cudaMalloc(address, num_bytes);  // it is on the card while kernels use it
}

API cudaError_t cudaHostAlloc(void** address, size_t num_bytes, unsigned) {
    TRACE();
    count(HOST_ALLOCATION);
    *address = allocate_pinned(num_bytes);
    return *address ? cudaSuccess : note_error(cudaErrorMemoryAllocation);
}

API cudaError_t cudaMallocHost(void** address, size_t num_bytes) { return cudaHostAlloc(address, num_bytes, 0); }

API cudaError_t cudaFreeHost(void* address) {
    TRACE();
    free_pinned(address);
    return cudaSuccess;
}

API cudaError_t cudaHostRegister(void* address, size_t num_bytes, unsigned) {
    TRACE();
    note_pinned(address, num_bytes);
    return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void* address) {
    TRACE();
    forget_pinned(address);
    return cudaSuccess;
}

API cudaError_t cudaHostGetDevicePointer(void** on_card, void* on_host, unsigned) {
    *on_card = on_host;
    return cudaSuccess;
}

API cudaError_t cudaHostGetFlags(unsigned* flags, void*) {
    *flags = 0;
    return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
    TRACE();
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = -2;  // as the genuine runtime says of memory that it does not know
    if (const Region* region = find_region(address)) {
        attributes->type = cudaMemoryTypeDevice;
        attributes->device = region->device;
        attributes->devicePointer = const_cast<void*>(address);
    } else if (is_pinned(address)) {
        attributes->type = cudaMemoryTypeHost;
        attributes->device = 0;
        attributes->devicePointer = attributes->hostPointer = const_cast<void*>(address);
    }
    return cudaSuccess;
}

API cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    static char variables[65536];  // of kernels, which are not run
    *address = variables;
    return cudaSuccess;
}

// ---- copies
// ----------------------------------------------------------------------------------------------------------

namespace {

// What one byte is when it is read back from the card, as `.all()`, `.any()` and `isfinite` do: no kernel computed it.
// Negative: whatever the memory holds.
int truth = static_cast<int>(number_from_environment("FAKE_BOOL", 1));

// What four bytes are when they are read back: how many elements a mask selects, which sizes what is made of them (they
// may be a float just as well, a loss, which nobody's memory depends on). Negative: whatever the memory holds.
int selected = -1;

cudaError_t copy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind) {
    switch (kind) {
        case cudaMemcpyHostToDevice:
            count(COPY_TO_CARD);
            count(BYTES_TO_CARD, nullptr, num_bytes);
            break;
        case cudaMemcpyDeviceToHost:
            count(COPY_TO_HOST);
            count(BYTES_TO_HOST, nullptr, num_bytes);
            if (num_bytes == 1 && truth >= 0) {
                *static_cast<char*>(to) = static_cast<char>(truth);
                return cudaSuccess;
            }
            if (num_bytes == sizeof selected && selected >= 0) {
                memcpy(to, &selected, sizeof selected);
                return cudaSuccess;
            }
            break;
        default: count(COPY_ON_CARD);
    }
    copy_bytes(to, from, num_bytes);
    return cudaSuccess;
}

}  // namespace

// For a case whose code asks something of data that kernels would have computed. Both give the answer until then.
API int rehearsal_set_truth(int value) { return std::exchange(truth, value); }
API int rehearsal_set_selected(int value) { return std::exchange(selected, value); }

API cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind) {
    TRACE();
    count(BLOCKING_COPY);
    return copy(to, from, num_bytes, kind);
}

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind, cudaStream_t) {
    TRACE();
    return copy(to, from, num_bytes, kind);
}

API cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t num_bytes) {
    TRACE();
    return copy(to, from, num_bytes, cudaMemcpyDeviceToDevice);
}

API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t num_bytes, cudaStream_t) {
    TRACE();
    return copy(to, from, num_bytes, cudaMemcpyDeviceToDevice);
}

API cudaError_t cudaMemcpy2DAsync(void* to, size_t pitch_to, const void* from, size_t pitch_from, size_t width,
                                  size_t height, cudaMemcpyKind, cudaStream_t) {
    TRACE();
    count(COPY_ON_CARD);
    for (size_t row = 0; row < height; row++)
        copy_bytes(static_cast<char*>(to) + row * pitch_to, static_cast<const char*>(from) + row * pitch_from, width);
    return cudaSuccess;
}

API cudaError_t cudaMemcpy2D(void* to, size_t pitch_to, const void* from, size_t pitch_from, size_t width,
                             size_t height, cudaMemcpyKind kind) {
    count(BLOCKING_COPY);
    return cudaMemcpy2DAsync(to, pitch_to, from, pitch_from, width, height, kind, nullptr);
}

API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

API cudaError_t cudaMemset(void* address, int value, size_t num_bytes) {
    TRACE();
    count(MEMSET);
    fill_bytes(address, value, num_bytes);
    return cudaSuccess;
}

API cudaError_t cudaMemsetAsync(void* address, int value, size_t num_bytes, cudaStream_t) {
    return cudaMemset(address, value, num_bytes);
}

API cudaError_t cudaMemset2DAsync(void* address, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
    TRACE();
    count(MEMSET);
    for (size_t row = 0; row < height; row++) fill_bytes(static_cast<char*>(address) + row * pitch, value, width);
    return cudaSuccess;
}

API cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) {
    return cudaSuccess;
}

API cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) { return cudaSuccess; }

// ---- streams and events
// ----------------------------------------------------------------------------------------------

namespace {

uint64_t new_handle() {
    static uint64_t handles = 0x10000;
    Guard guard(lock);
    return handles += 0x100;
}

double milliseconds_now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec * 1e-6;
}

// An event is the moment at which it was recorded.
double& moment_of(cudaEvent_t event) { return *reinterpret_cast<double*>(event); }

}  // namespace

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    TRACE();
    if (cudaError_t error = with_context()) return error;
    *stream = reinterpret_cast<cudaStream_t>(new_handle());
    return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }

API cudaError_t cudaStreamSynchronize(cudaStream_t) {
    TRACE();
    count(STREAM_SYNCHRONISATION);
    return cudaSuccess;
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    TRACE();
    count(STREAM_WAIT);
    return cudaSuccess;
}

API cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) { return cudaGetDevice(device); }

API cudaError_t cudaStreamGetFlags(cudaStream_t, unsigned* flags) {
    *flags = 0;
    return cudaSuccess;
}

API cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
    *id = reinterpret_cast<unsigned long long>(stream);
    return cudaSuccess;
}

API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                         size_t* num_dependencies) {
    if (status) *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (num_dependencies) *num_dependencies = 0;
    return cudaSuccess;
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    *mode = cudaStreamCaptureModeRelaxed;
    return cudaSuccess;
}

API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* argument, unsigned) {
    TRACE();
    function(stream, cudaSuccess, argument);
    return cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* argument) {
    TRACE();
    function(argument);
    return cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    TRACE();
    if (cudaError_t error = with_context()) return error;
    *event = reinterpret_cast<cudaEvent_t>(new double(milliseconds_now()));
    return cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

API cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete &moment_of(event);
    return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    TRACE();
    count(EVENT_RECORD);
    moment_of(event) = milliseconds_now();
    return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}

API cudaError_t cudaEventQuery(cudaEvent_t) {
    TRACE();
    count(EVENT_QUERY);
    return cudaSuccess;
}

API cudaError_t cudaEventSynchronize(cudaEvent_t) {
    TRACE();
    count(EVENT_SYNCHRONISATION);
    return cudaSuccess;
}

API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    *milliseconds = static_cast<float>(moment_of(end) - moment_of(begin));
    return cudaSuccess;
}

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
    trace(name);
    *function = rehearsal_driver_entry(name);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// ---- for the rehearsal's own Python, by ctypes
// -----------------------------------------------------------------------

API void rehearsal_set_memory(size_t total, size_t context) { set_memory(total, context); }
API size_t rehearsal_peak_bytes() { return peak_bytes(0); }
