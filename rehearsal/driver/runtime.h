// What the parts of the runtime give each other.
#pragma once

#include <cuda_runtime_api.h>

cudaError_t note_error(cudaError_t error);  // remembers a failure for cudaGetLastError, and returns it
int attribute_of_card(cudaDeviceAttr attribute);
