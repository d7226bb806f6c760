// What the files that stand in for a library have in common: how a function is exported, and the trace of calls.
#pragma once

#include <cstdio>
#include <cstdlib>

#define API extern "C" __attribute__((visibility("default")))

// FAKE_CUDA_TRACE prints every call: how one finds what a program asked for before it failed.
inline void trace(const char* function) {
    static const bool wanted = getenv("FAKE_CUDA_TRACE") != nullptr;
    if (wanted) fprintf(stderr, "[rehearsal] %s\n", function);
}

#define TRACE() trace(__func__)
