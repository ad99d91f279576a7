// How launchers size a grid, on whatever device is current.
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

}  // namespace phi4
