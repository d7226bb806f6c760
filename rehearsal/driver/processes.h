// Who has how much of the cards: a table in shared memory, so that a process sees in cudaMemGetInfo and in NVML what
// the others have. What a process that died has left there is taken back when somebody looks.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

constexpr int MOST_CARDS = 8;
constexpr int MOST_PROCESSES = 64;

struct ProcessSlot {
    volatile int pid;
    volatile uint64_t used_bytes[MOST_CARDS];
};

struct ProcessTable {
    ProcessSlot slots[MOST_PROCESSES];
};

// The table of the file that FAKE_SHARED names, else one of the user; null where it cannot be mapped.
inline ProcessTable* open_process_table() {
    const char* named = getenv("FAKE_SHARED");
    std::string path = named && *named ? named : "/dev/shm/rehearsal." + std::to_string(getuid());
    int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
    if (file < 0) return nullptr;
    void* mapped = MAP_FAILED;
    if (ftruncate(file, sizeof(ProcessTable)) == 0)
        mapped = mmap(nullptr, sizeof(ProcessTable), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return mapped == MAP_FAILED ? nullptr : static_cast<ProcessTable*>(mapped);
}

inline bool is_alive(int pid) { return pid && (kill(pid, 0) == 0 || errno == EPERM); }

inline void clear(ProcessSlot& slot) {
    for (volatile uint64_t& bytes : slot.used_bytes) bytes = 0;
}

// The slot of this process, or one that nobody alive has; null where all are taken.
inline ProcessSlot* take_slot(ProcessTable& table, int pid) {
    for (ProcessSlot& slot : table.slots)
        if (slot.pid == pid) {
            clear(slot);
            return &slot;
        }
    for (ProcessSlot& slot : table.slots)
        if (!is_alive(slot.pid)) {
            clear(slot);
            slot.pid = pid;
            return &slot;
        }
    return nullptr;
}

inline uint64_t used_by_others(ProcessTable& table, int pid, int device) {
    uint64_t total = 0;
    for (ProcessSlot& slot : table.slots) {
        if (!slot.pid || slot.pid == pid || !slot.used_bytes[device]) continue;
        if (is_alive(slot.pid))
            total += slot.used_bytes[device];
        else
            slot.pid = 0;
    }
    return total;
}
