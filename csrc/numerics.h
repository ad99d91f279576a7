// What all ops share: conversions, and packs of four elements moved at once. Everything here runs
// on the host too. The arithmetic is spelled out with fmaf and built without contraction, so host
// and device agree in every bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <vector_types.h>

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PHI4_HD __host__ __device__ __forceinline__
#else
#define PHI4_HD inline
#endif

namespace phi4 {

constexpr int kPack = 4;

template <typename T>
struct alignas(sizeof(T) * kPack) Pack {
    T lane[kPack];
};

PHI4_HD float widened(float x) { return x; }
PHI4_HD float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
PHI4_HD __nv_bfloat16 to_bfloat16(float x) { return __float2bfloat16_rn(x); }

// |x| as an integer that orders like it; NaN is above infinity, so a maximum keeps it.
PHI4_HD uint32_t magnitude_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits & 0x7fffffffu;
}

PHI4_HD float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

template <typename T>
PHI4_HD bool pack_aligned(const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(Pack<T>) == 0;
}

// One access of a whole pack. Left to itself the compiler splits it into lanes.
template <int kBytes>
struct Word;
template <>
struct Word<4> {
    using Type = uint32_t;
};
template <>
struct Word<8> {
    using Type = uint2;
};
template <>
struct Word<16> {
    using Type = uint4;
};

template <typename T>
PHI4_HD Pack<T> load_whole(const T* from) {
    Pack<T> pack;
#ifdef __CUDA_ARCH__
    const auto word = *reinterpret_cast<const typename Word<sizeof(pack)>::Type*>(from);
    memcpy(&pack, &word, sizeof(pack));
#else
    memcpy(&pack, from, sizeof(pack));
#endif
    return pack;
}

// In assembly, because an assignment is split again where a tail follows.
#ifdef __CUDA_ARCH__
__device__ __forceinline__ void store_word(void* to, uint32_t word) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(word)
                 : "memory");
}
__device__ __forceinline__ void store_word(void* to, uint2 word) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(word.x), "r"(word.y)
                 : "memory");
}
__device__ __forceinline__ void store_word(void* to, uint4 word) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
}
#endif

// To global memory.
template <typename T>
PHI4_HD void store_whole(T* to, const Pack<T>& pack) {
#ifdef __CUDA_ARCH__
    typename Word<sizeof(pack)>::Type word;
    memcpy(&word, &pack, sizeof(pack));
    store_word(to, word);
#else
    memcpy(to, &pack, sizeof(pack));
#endif
}

// `wide` is uniform over a tensor: whole packs may be moved at once.
template <typename T>
PHI4_HD Pack<T> load_pack(const T* from, int64_t count, bool wide) {
    if (wide && count >= kPack) return load_whole(from);
    Pack<T> pack;
    for (int i = 0; i < kPack; ++i) pack.lane[i] = i < count ? from[i] : T(0.0f);
    return pack;
}

template <typename T>
PHI4_HD void store_pack(T* to, const Pack<T>& pack, int64_t count, bool wide) {
    if (wide && count >= kPack) {
        store_whole(to, pack);
        return;
    }
    for (int i = 0; i < kPack; ++i) {
        if (i < count) to[i] = pack.lane[i];
    }
}

}  // namespace phi4
