// What all ops share: conversions, and packs of four elements moved at once. Everything here runs
// on the host too. The arithmetic is spelled out with fmaf and built without contraction, so host
// and device agree in every bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

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

// `wide` is uniform over a launch: whole packs may be moved at once.
template <typename T>
PHI4_HD Pack<T> load_pack(const T* from, int64_t count, bool wide) {
    if (wide && count >= kPack) return *reinterpret_cast<const Pack<T>*>(from);
    Pack<T> pack;
    for (int i = 0; i < kPack; ++i) pack.lane[i] = i < count ? from[i] : T(0.0f);
    return pack;
}

template <typename T>
PHI4_HD void store_pack(T* to, const Pack<T>& pack, int64_t count, bool wide) {
    if (wide && count >= kPack) {
        *reinterpret_cast<Pack<T>*>(to) = pack;
        return;
    }
    for (int i = 0; i < kPack; ++i) {
        if (i < count) to[i] = pack.lane[i];
    }
}

}  // namespace phi4
