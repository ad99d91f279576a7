// Sum of squares in fp64. A tensor is cut into chunks, a chunk is dealt to 256 lanes pack by pack,
// and lanes and chunks are added in pairs: the order follows from the sizes, never from the grid.
#pragma once

#include <cmath>

#include "../numerics.h"
#include "../phi4_csrc.h"

namespace phi4 {

constexpr int kLanes = 256;
constexpr int64_t kChunk = 65536;
constexpr int kPacksPerLane = kChunk / (kLanes * kPack);

PHI4_HD int64_t num_chunks(int64_t size) { return (size + kChunk - 1) / kChunk; }

template <typename T>
PHI4_HD double square_sum(const Pack<T>& pack, double sum) {
    for (int i = 0; i < kPack; ++i) {
        const double x = widened(pack.lane[i]);
        sum = fma(x, x, sum);
    }
    return sum;
}

// A lane's part of a whole, aligned chunk.
template <typename T>
PHI4_HD double whole_lane_sum(const T* chunk, int lane) {
    double sum = 0.0;
#ifdef __CUDACC__
#pragma unroll 8
#endif
    for (int i = 0; i < kPacksPerLane; ++i) {
        const int64_t offset = (int64_t{i} * kLanes + lane) * kPack;
        sum = square_sum(load_whole(chunk + offset), sum);
    }
    return sum;
}

template <typename T>
PHI4_HD double lane_sum(const T* chunk, int64_t count, int lane) {
    if (count == kChunk && pack_aligned(chunk)) return whole_lane_sum(chunk, lane);
    double sum = 0.0;
    for (int64_t offset = int64_t{lane} * kPack; offset < count; offset += kLanes * kPack) {
        sum = square_sum(load_pack(chunk + offset, count - offset, false), sum);
    }
    return sum;
}

PHI4_HD double partials_lane_sum(const double* partials, int64_t count, int lane) {
    double sum = 0.0;
    for (int64_t i = lane; i < count; i += kLanes) sum += partials[i];
    return sum;
}

}  // namespace phi4
