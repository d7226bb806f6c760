// The driver's functions by name, as PyTorch asks for them (cudaGetDriverEntryPoint) and as libcuda.so.1 exports them.
#pragma once

extern "C" __attribute__((visibility("default"))) void* rehearsal_driver_entry(const char* name);
