// Stands in for the driver (libcuda): what PyTorch asks for by name through the runtime, and what libcuda.so.1 exports
// to Triton and others. Expandable segments map physical memory into reserved addresses by it.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <sys/mman.h>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>

#include "api.h"
#include "card_memory.h"
#include "cards.h"
#include "counters.h"
#include "driver_entries.h"
#include "runtime.h"

namespace {

struct PhysicalMemory {
    size_t num_bytes;
    int device;
};

std::map<CUmemGenericAllocationHandle, PhysicalMemory> handles;
CUmemGenericAllocationHandle next_handle = 0x1000;

void* at(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

// ---- cards ----

CUresult init(unsigned) { return CUDA_SUCCESS; }

CUresult driver_version(int* version) {
    *version = CUDA_VERSION_OF_DRIVER;
    return CUDA_SUCCESS;
}

CUresult device_get(CUdevice* device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult device_count(int* number) {
    *number = number_of_cards();
    return CUDA_SUCCESS;
}

CUresult device_name(char* text, int length, CUdevice) {
    snprintf(text, length, "%s", chosen_card().name);
    return CUDA_SUCCESS;
}

CUresult device_total_memory(size_t* num_bytes, CUdevice) {
    *num_bytes = total_bytes();
    return CUDA_SUCCESS;
}

CUresult device_uuid(CUuuid* uuid, CUdevice device) {
    memcpy(uuid->bytes, uuid_of_card(device).data(), 16);
    return CUDA_SUCCESS;
}

CUresult device_attribute(int* value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:  // without it no expandable segments
        case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: *value = 1; break;
        default: *value = attribute_of_card(static_cast<cudaDeviceAttr>(attribute));  // the runtime's numbers are equal
    }
    return CUDA_SUCCESS;
}

CUresult context_device(CUdevice* device) {
    *device = current_device();
    return CUDA_SUCCESS;
}

CUresult context_limit(size_t* value, CUlimit) {
    *value = 1024;
    return CUDA_SUCCESS;
}

// ---- memory ----

CUresult address_range(CUdeviceptr* begin, size_t* num_bytes, CUdeviceptr address) {
    Guard guard(lock);
    const Region* region = find_region(at(address));
    if (!region) return CUDA_ERROR_NOT_FOUND;
    if (begin) *begin = region->address;
    if (num_bytes) *num_bytes = region->num_bytes;
    return CUDA_SUCCESS;
}

CUresult address_reserve(CUdeviceptr* address, size_t num_bytes, size_t alignment, CUdeviceptr, unsigned long long) {
    *address = reserve_addresses(round_up(num_bytes), alignment, PROT_NONE, current_device());
    return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult address_free(CUdeviceptr address, size_t num_bytes) {
    release_addresses(address, round_up(num_bytes));
    return CUDA_SUCCESS;
}

CUresult create(CUmemGenericAllocationHandle* handle, size_t num_bytes, const CUmemAllocationProp* properties,
                unsigned long long) {
    count(MALLOC);
    Guard guard(lock);
    int device = properties ? properties->location.id : current_device();
    if (num_bytes % GRANULARITY) return CUDA_ERROR_INVALID_VALUE;
    // PyTorch tries handles for NVLink's fabric first and falls back when they are refused, as here
    if (properties && (properties->requestedHandleTypes & CU_MEM_HANDLE_TYPE_FABRIC)) return CUDA_ERROR_NOT_SUPPORTED;
    if (!take_bytes(device, num_bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
    *handle = next_handle++;
    handles[*handle] = {num_bytes, device};
    return CUDA_SUCCESS;
}

CUresult release(CUmemGenericAllocationHandle handle) {
    count(FREE);
    Guard guard(lock);
    auto found = handles.find(handle);
    if (found == handles.end()) return CUDA_ERROR_INVALID_VALUE;
    give_bytes(found->second.device, found->second.num_bytes);
    handles.erase(found);
    return CUDA_SUCCESS;
}

CUresult map(CUdeviceptr address, size_t num_bytes, size_t, CUmemGenericAllocationHandle, unsigned long long) {
    bool failed = mprotect(at(address), num_bytes, PROT_READ | PROT_WRITE) != 0;
    return failed ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult unmap(CUdeviceptr address, size_t num_bytes) {
    // mapped anew, so that the host gets its pages back
    int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    mmap(at(address), num_bytes, PROT_NONE, flags, -1, 0);
    return CUDA_SUCCESS;
}

CUresult set_access(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }

CUresult granularity(size_t* num_bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
    *num_bytes = GRANULARITY;
    return CUDA_SUCCESS;
}

CUresult pointer_attribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
    const Region* region = find_region(at(address));
    if (attribute == CU_POINTER_ATTRIBUTE_BUFFER_ID)
        *static_cast<unsigned long long*>(value) = region ? region->address : 0;
    else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)  // Triton asks for it with every tensor
        *static_cast<CUdeviceptr*>(value) = address;
    else
        *static_cast<unsigned*>(value) = 0;
    return CUDA_SUCCESS;
}

// ---- kernels that are compiled while the program runs: Triton's ----

CUresult launch_kernel() {
    count(TRITON_KERNEL, "triton");
    return CUDA_SUCCESS;
}

CUresult function_attribute(int* value, CUfunction_attribute attribute, CUfunction) {
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 64; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult occupancy(int* number, CUfunction, int, size_t) {
    *number = 2;
    return CUDA_SUCCESS;
}

CUresult clusters(int* number, CUfunction, const CUlaunchConfig*) {
    *number = chosen_card().multiprocessors / 2;
    return CUDA_SUCCESS;
}

// A context, module, function or linker: one stands for all, since nothing is kept in it.
template <typename Handle>
CUresult give(Handle* handle) {
    *handle = reinterpret_cast<Handle>(1);
    return CUDA_SUCCESS;
}

CUresult context_current(CUcontext* context) { return give(context); }
CUresult context_of_stream(CUstream, CUcontext* context) { return give(context); }
CUresult context_retain(CUcontext* context, CUdevice) { return give(context); }
CUresult module_load(CUmodule* module, const void*) { return give(module); }
CUresult module_load_with_options(CUmodule* module, const void*, unsigned, CUjit_option*, void**) {
    return give(module);
}
CUresult module_function(CUfunction* function, CUmodule, const char*) { return give(function); }
CUresult link_create(unsigned, CUjit_option*, void**, CUlinkState* state) { return give(state); }

CUresult context_state(CUdevice, unsigned* flags, int* active) {
    if (flags) *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

// ---- the rest ----

CUresult error_string(CUresult error, const char** text) {
    switch (error) {
        case CUDA_ERROR_OUT_OF_MEMORY: *text = "out of memory"; break;
        case CUDA_ERROR_INVALID_VALUE: *text = "invalid argument"; break;
        case CUDA_ERROR_NOT_SUPPORTED: *text = "operation not supported"; break;
        default: *text = "unknown error of the rehearsal";
    }
    return CUDA_SUCCESS;
}

CUresult done() { return CUDA_SUCCESS; }

CUresult refused() {
    fprintf(stderr, "[rehearsal] a call of the driver is not supported\n");
    return CUDA_ERROR_NOT_SUPPORTED;
}

template <typename Function>
void* pointer(Function* function) {
    return reinterpret_cast<void*>(function);
}

const std::unordered_map<std::string, void*>& entries() {
    static const auto* table = new std::unordered_map<std::string, void*>{
        {"cuInit", pointer(init)},
        {"cuDriverGetVersion", pointer(driver_version)},
        {"cuDeviceGet", pointer(device_get)},
        {"cuDeviceGetCount", pointer(device_count)},
        {"cuDeviceGetName", pointer(device_name)},
        {"cuDeviceTotalMem_v2", pointer(device_total_memory)},
        {"cuDeviceGetUuid_v2", pointer(device_uuid)},
        {"cuDeviceGetAttribute", pointer(device_attribute)},
        {"cuDevicePrimaryCtxGetState", pointer(context_state)},
        {"cuDevicePrimaryCtxRetain", pointer(context_retain)},
        {"cuCtxGetCurrent", pointer(context_current)},
        {"cuCtxSetCurrent", pointer(done)},
        {"cuCtxGetDevice", pointer(context_device)},
        {"cuCtxGetLimit", pointer(context_limit)},
        {"cuCtxSetLimit", pointer(done)},
        {"cuCtxSynchronize", pointer(done)},
        {"cuStreamGetCtx", pointer(context_of_stream)},
        {"cuStreamWriteValue32", pointer(done)},
        {"cuMemGetAddressRange", pointer(address_range)},
        {"cuMemGetAddressRange_v2", pointer(address_range)},
        {"cuMemAddressReserve", pointer(address_reserve)},
        {"cuMemAddressFree", pointer(address_free)},
        {"cuMemCreate", pointer(create)},
        {"cuMemRelease", pointer(release)},
        {"cuMemMap", pointer(map)},
        {"cuMemUnmap", pointer(unmap)},
        {"cuMemSetAccess", pointer(set_access)},
        {"cuMemGetAllocationGranularity", pointer(granularity)},
        {"cuMemExportToShareableHandle", pointer(refused)},
        {"cuMemImportFromShareableHandle", pointer(refused)},
        {"cuMemRetainAllocationHandle", pointer(refused)},
        {"cuMemGetAllocationPropertiesFromHandle", pointer(refused)},
        {"cuMemsetD32Async", pointer(refused)},
        {"cuPointerGetAttribute", pointer(pointer_attribute)},
        {"cuPointerGetAttributes", pointer(done)},
        {"cuTensorMapEncodeTiled", pointer(done)},
        {"cuTensorMapEncodeIm2col", pointer(done)},
        {"cuModuleLoad", pointer(module_load)},
        {"cuModuleLoadData", pointer(module_load)},
        {"cuModuleLoadDataEx", pointer(module_load_with_options)},
        {"cuModuleGetFunction", pointer(module_function)},
        {"cuModuleUnload", pointer(done)},
        {"cuLinkCreate_v2", pointer(link_create)},
        {"cuLinkAddData_v2", pointer(done)},
        {"cuLinkComplete", pointer(done)},
        {"cuFuncGetAttribute", pointer(function_attribute)},
        {"cuFuncSetAttribute", pointer(done)},
        {"cuFuncSetCacheConfig", pointer(done)},
        {"cuOccupancyMaxActiveBlocksPerMultiprocessor", pointer(occupancy)},
        {"cuOccupancyMaxActiveClusters", pointer(clusters)},
        {"cuLaunchKernel", pointer(launch_kernel)},
        {"cuLaunchKernelEx", pointer(launch_kernel)},
        {"cuLaunchCooperativeKernel", pointer(launch_kernel)},
        {"cuGetErrorString", pointer(error_string)},
        {"cuGetErrorName", pointer(error_string)},
    };
    return *table;
}

}  // namespace

void* rehearsal_driver_entry(const char* name) {
    auto found = entries().find(name);
    return found == entries().end() ? nullptr : found->second;
}
