// The cards that FAKE_CARD can name, as NVIDIA's driver describes them to a program.
#pragma once

#include <array>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

struct Card {
    const char* key;   // the value of FAKE_CARD
    const char* name;  // as CUDA and NVML give it
    int major, minor;  // compute capability
    // Of the machine code that PyTorch's wheels carry for such a card (sm_75, 80, 86, 90, 100, 120): PyTorch asks a
    // kernel for it before it chooses some of them.
    int binary_version;
    int multiprocessors;
    int threads_per_multiprocessor;
    int blocks_per_multiprocessor;
    int shared_memory_per_multiprocessor;
    int shared_memory_per_block;  // at most, where a kernel opts in
    int l2_cache_bytes;
    int memory_bus_bits;
    size_t visible_bytes;  // the total of cudaMemGetInfo
    size_t box_bytes;      // the total of NVML; the driver keeps the difference for itself
};

inline constexpr Card CARDS[] = {
    {"4090", "NVIDIA GeForce RTX 4090", 8, 9, 86, 128, 1536, 24, 102400, 101376, 75497472, 384, 25386352640,
     25757220864},
    {"3090", "NVIDIA GeForce RTX 3090", 8, 6, 86, 82, 1536, 16, 102400, 101376, 6291456, 384, 25297289216, 25769803776},
    {"A100", "NVIDIA A100-SXM4-80GB", 8, 0, 80, 108, 2048, 32, 167936, 166912, 41943040, 5120, 85094825984,
     85899345920},
    {"H100", "NVIDIA H100 80GB HBM3", 9, 0, 90, 132, 2048, 32, 233472, 232448, 52428800, 5120, 84942979072,
     85520809984},
    {"T4", "Tesla T4", 7, 5, 75, 40, 1024, 16, 65536, 65536, 4194304, 256, 15642329088, 16106127360},
    {"5090", "NVIDIA GeForce RTX 5090", 12, 0, 120, 170, 1536, 24, 102400, 101376, 100663296, 512, 33669005312,
     34190917632},
};

inline constexpr const char* DRIVER_VERSION = "580.95.05";
inline constexpr int CUDA_VERSION_OF_DRIVER = 13000;

// The value of an environment variable as a number; `otherwise` where it is not set or empty.
inline size_t number_from_environment(const char* name, size_t otherwise) {
    const char* text = getenv(name);
    return text && *text ? strtoull(text, nullptr, 0) : otherwise;
}

// The card that FAKE_CARD names, an RTX 4090 where it is not set. An unknown name ends the process: a rehearsal of
// another card than the one that was meant would be worse.
inline const Card& chosen_card() {
    const char* key = getenv("FAKE_CARD");
    if (!key || !*key) return CARDS[0];
    for (const Card& card : CARDS)
        if (!strcmp(card.key, key)) return card;
    fprintf(stderr, "[rehearsal] FAKE_CARD=%s is none of", key);
    for (const Card& card : CARDS) fprintf(stderr, " %s", card.key);
    fprintf(stderr, "\n");
    exit(1);
}

inline int number_of_cards() { return static_cast<int>(number_from_environment("FAKE_DEVICES", 1)); }

inline size_t memory_of_card() { return number_from_environment("FAKE_VRAM_BYTES", chosen_card().visible_bytes); }

// CUDA and NVML have to tell the same, since programs match the one's cards with the other's by it.
inline std::array<unsigned char, 16> uuid_of_card(int device) {
    std::array<unsigned char, 16> bytes;
    for (size_t i = 0; i < bytes.size(); i++) bytes[i] = static_cast<unsigned char>(0xa0 + i);
    bytes.back() = static_cast<unsigned char>(device);
    return bytes;
}
