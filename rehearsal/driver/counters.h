// What reaches the card, counted. `rehearsal/launches` reads the counters by ctypes; its names follow this order.
#pragma once

#include <cstddef>

enum Counted {
    KERNEL,
    MATRIX_PRODUCT,  // a call of cuBLAS: one, whatever it launches
    LIBRARY_CALL,    // of cuBLAS's vector operations and cuDNN's graphs
    TRITON_KERNEL,
    MEMSET,
    COPY_TO_CARD,
    COPY_TO_HOST,
    COPY_ON_CARD,
    STREAM_SYNCHRONISATION,
    DEVICE_SYNCHRONISATION,
    EVENT_SYNCHRONISATION,
    BLOCKING_COPY,
    MALLOC,
    FREE,
    EVENT_RECORD,
    EVENT_QUERY,
    MEMORY_QUERY,
    HOST_ALLOCATION,
    STREAM_WAIT,
    BYTES_TO_CARD,
    BYTES_TO_HOST,
    NUM_COUNTED
};

// amount: 1, or bytes. what: the host address of a kernel, the name of a library's function, null for the rest.
void count(Counted counted, const void* what = nullptr, size_t amount = 1);
