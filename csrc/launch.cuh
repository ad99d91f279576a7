// How launchers size a grid, on whatever device is current, and how a block finds its tensor.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace phi4 {

// Blocks for `items` blocks' worth of work in a grid-stride loop, at most a few waves.
inline cudaError_t strided_grid(int64_t items, int blocks_per_sm, unsigned* blocks) {
    int device = 0, num_sms = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
    *blocks = static_cast<unsigned>(std::min<int64_t>(items, int64_t{num_sms} * blocks_per_sm));
    return error;
}

// The last of `count` tensors that starts at or before a chunk.
__device__ inline int owner_of(const int64_t* first_chunk, int count, int64_t chunk) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first_chunk[middle] <= chunk) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

}  // namespace phi4
