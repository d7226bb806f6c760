// Stands in for those calls of cuBLAS, cuDNN and NCCL that have to answer something. All their others are generated
// (generate_stubs.py): they succeed and do nothing.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "api.h"
#include "card_memory.h"
#include "generated/versions.h"

namespace {
constexpr size_t DESCRIPTOR_BYTES = 4096;  // more than any descriptor that a caller may write into

void* new_descriptor() { return calloc(1, DESCRIPTOR_BYTES); }
}  // namespace

// ---- cuBLAS
// ----------------------------------------------------------------------------------------------------------

API int cublasGetMathMode(void*, int* mode) {
    *mode = 0;
    return 0;
}

API int cublasGetPointerMode_v2(void*, int* mode) {
    *mode = 0;
    return 0;
}

API size_t cublasLtGetVersion() { return CUBLAS_VERSION_OF_WHEEL; }

namespace {
// As cublasLt.h lays it out. No workspace of its own: which algorithm a card would be given is not known.
struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};
}  // namespace

API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int requested, Heuristic* found,
                                       int* number) {
    *number = requested > 0;
    if (*number) memset(found, 0, sizeof *found);
    return 0;
}

API int cublasLtMatmulAlgoCheck(void*, void*, void*, void*, void*, void*, void*, Heuristic* result) {
    memset(result, 0, sizeof *result);
    return 0;
}

// ---- cuDNN
// -----------------------------------------------------------------------------------------------------------

API size_t cudnnGetVersion() { return CUDNN_VERSION_OF_WHEEL; }
API size_t cudnnGetCudartVersion() { return 13000; }
API const char* cudnnGetErrorString(int) { return "cuDNN in a rehearsal"; }

API void cudnnGetLastErrorString(char* text, size_t length) {
    if (length) *text = 0;
}

API int cudnnGetProperty(int which, int* value) {
    int parts[] = {CUDNN_VERSION_OF_WHEEL / 10000, CUDNN_VERSION_OF_WHEEL / 100 % 100, CUDNN_VERSION_OF_WHEEL % 100};
    *value = which < 3 ? parts[which] : 0;
    return 0;
}

API int cudnnGetStream(void*, void** stream) {
    *stream = nullptr;
    return 0;
}

API int cudnnDropoutGetStatesSize(void*, size_t* num_bytes) {
    *num_bytes = 1 << 20;
    return 0;
}

API int cudnnBackendCreateDescriptor(int, void** descriptor) {
    *descriptor = new_descriptor();
    return 0;
}

API int cudnnBackendDestroyDescriptor(void* descriptor) {
    free(descriptor);
    return 0;
}

// A graph of cuDNN has one engine and one plan here, which needs no workspace.
API int cudnnBackendGetAttribute(void*, int attribute, int type, int64_t wanted, int64_t* number, void* values) {
    enum { ENGINE_INTERMEDIATES = 301, ENGINE_KNOBS = 302 };
    enum { TYPE_INT64 = 3, TYPE_DESCRIPTOR = 15, TYPE_INT32 = 23 };
    TRACE();
    bool has_one = attribute != ENGINE_INTERMEDIATES && attribute != ENGINE_KNOBS &&
                   (type == TYPE_DESCRIPTOR || type == TYPE_INT64 || type == TYPE_INT32);
    if (number) *number = has_one;
    if (!has_one || !values || wanted < 1) return 0;
    if (type == TYPE_INT64) *static_cast<int64_t*>(values) = 0;
    if (type == TYPE_INT32) *static_cast<int32_t*>(values) = 0;
    return 0;
}

// ---- NCCL: a group of processes that exchange nothing
// ----------------------------------------------------------------

namespace {

struct Communicator {
    int rank, size, device;
};

struct UniqueId {
    char bytes[128];
};

int new_communicator(void** communicator, int size, int rank) {
    *communicator = new Communicator{rank, size, current_device()};
    return 0;
}

Communicator& as_communicator(void* handle) { return *static_cast<Communicator*>(handle); }

}  // namespace

API int ncclGetVersion(int* version) {
    *version = NCCL_VERSION_OF_WHEEL;
    return 0;
}

API int ncclGetUniqueId(UniqueId* id) {
    memset(id, 7, sizeof *id);
    return 0;
}

API int ncclCommInitRank(void** made, int size, UniqueId, int rank) { return new_communicator(made, size, rank); }

API int ncclCommInitRankConfig(void** made, int size, UniqueId, int rank, void*) {
    return new_communicator(made, size, rank);
}

API int ncclCommInitRankScalable(void** made, int size, int rank, int, UniqueId*, void*) {
    return new_communicator(made, size, rank);
}

API int ncclCommSplit(void* from, int, int, void** made, void*) {
    return new_communicator(made, as_communicator(from).size, as_communicator(from).rank);
}

API int ncclCommCount(void* handle, int* size) {
    *size = as_communicator(handle).size;
    return 0;
}

API int ncclCommUserRank(void* handle, int* rank) {
    *rank = as_communicator(handle).rank;
    return 0;
}

API int ncclCommCuDevice(void* handle, int* device) {
    *device = as_communicator(handle).device;
    return 0;
}

API int ncclCommGetAsyncError(void*, int* error) {
    *error = 0;
    return 0;
}

API const char* ncclGetErrorString(int) { return "NCCL in a rehearsal"; }
API const char* ncclGetLastError(void*) { return ""; }

API int ncclCommRegister(void*, void*, size_t, void** handle) {
    *handle = new_descriptor();
    return 0;
}

API int ncclMemAlloc(void** address, size_t num_bytes) {
    *address = malloc(num_bytes);
    return 0;
}

API int ncclMemFree(void* address) {
    free(address);
    return 0;
}
