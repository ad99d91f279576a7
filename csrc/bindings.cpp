// The ops as torch sees them, on torch's stable ABI: one build serves every torch from 2.11 on.
// CUDA tensors go to the launchers, CPU tensors to the host forms of the same arithmetic. The
// stream is an argument because reading the current one is not part of the ABI on a machine without
// CUDA; the public operators of namespace phi4, defined in Python, read it and call these.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "phi4_csrc.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void* on_stream(int64_t stream) { return reinterpret_cast<void*>(stream); }

void check_launch(const char* op, int error) {
    STD_TORCH_CHECK(error == 0, op, ": the launch failed with cudaError ", error,
                    "; expected 0; look the number up in driver_types.h");
}

void check_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
    STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name,
                    " is not contiguous; expected a flat buffer; call contiguous() before");
    STD_TORCH_CHECK(tensor.device() == like.device(), op, ": ", name,
                    " is on another device than the first tensor; move it there");
}

void check_type(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " has dtype ",
                    torch::headeronly::toString(tensor.scalar_type()), "; expected ",
                    torch::headeronly::toString(type), "; cast it before");
}

int float_type(const char* op, const char* name, const Tensor& tensor) {
    const bool half = tensor.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(half || tensor.scalar_type() == ScalarType::Float, op, ": ", name,
                    " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                    "; expected Float or BFloat16; cast it before");
    return half ? PHI4_BFLOAT16 : PHI4_FLOAT32;
}

// One element of a given type next to `like`, or null.
template <typename T>
const T* scalar(const char* op, const char* name, const std::optional<Tensor>& tensor,
                const Tensor& like, ScalarType type) {
    if (!tensor) return nullptr;
    check_tensor(op, name, *tensor, like);
    check_type(op, name, *tensor, type);
    STD_TORCH_CHECK(tensor->numel() == 1, op, ": ", name, " has ", tensor->numel(),
                    " elements; expected 1; pass a scalar tensor");
    return static_cast<const T*>(tensor->data_ptr());
}

using Tensors = std::vector<Tensor>;

// One tensor per parameter, contiguous, of its size, and of `type` unless that is null.
void check_shards(const char* op, const char* name, const Tensors& tensors, const Tensors& params,
                  const ScalarType* type) {
    STD_TORCH_CHECK(tensors.size() == params.size(), op, ": got ", tensors.size(), " of ", name,
                    "; expected ", params.size(), ", one per param");
    for (size_t i = 0; i < tensors.size(); ++i) {
        check_tensor(op, name, tensors[i], params.front());
        STD_TORCH_CHECK(tensors[i].numel() == params[i].numel(), op, ": ", name, " ", i, " has ",
                        tensors[i].numel(), " elements; expected ", params[i].numel(),
                        ", as many as its param");
        if (type != nullptr) check_type(op, name, tensors[i], *type);
    }
}

void adamw(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors grads, Tensors weights,
           Tensors fp8_weights, Tensors fp8_scales, Tensors fp8_amaxes,
           std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
           std::optional<Tensor> device_lr, std::optional<Tensor> device_step, double lr,
           double beta1, double beta2, double eps, double weight_decay, int64_t step,
           int64_t stream) {
    const char* op = "adamw";
    STD_TORCH_CHECK(!params.empty(), op, ": got no params; expected at least one; skip the call");
    const ScalarType single = ScalarType::Float, half = ScalarType::BFloat16,
                     fp8 = ScalarType::Float8_e4m3fn;
    check_shards(op, "param", params, params, &single);
    check_shards(op, "exp_avg", exp_avgs, params, &single);
    check_shards(op, "exp_avg_sq", exp_avg_sqs, params, &single);
    const int grad_type = float_type(op, "grad", grads.empty() ? params.front() : grads.front());
    check_shards(op, "grad", grads, params, grad_type == PHI4_BFLOAT16 ? &half : &single);
    if (!weights.empty()) check_shards(op, "weight", weights, params, &half);
    if (!fp8_weights.empty()) check_shards(op, "fp8 weight", fp8_weights, params, &fp8);
    STD_TORCH_CHECK(
        fp8_scales.size() == fp8_weights.size() && fp8_amaxes.size() == fp8_weights.size(), op,
        ": got ", fp8_scales.size(), " fp8 scales and ", fp8_amaxes.size(),
        " fp8 amaxes; expected ", fp8_weights.size(), ", one per fp8 weight");
    STD_TORCH_CHECK(device_step || step >= 1, op, ": step is ", step,
                    "; expected at least 1, the step that this update is");
    const Tensor& first = params.front();
    std::vector<Phi4AdamWShard> shards;
    for (size_t i = 0; i < params.size(); ++i) {
        const bool has_fp8 = !fp8_weights.empty();
        float* amax = nullptr;
        const float* scale = nullptr;
        if (has_fp8) {
            scale = scalar<float>(op, "fp8 scale", fp8_scales[i], first, ScalarType::Float);
            amax = const_cast<float*>(
                scalar<float>(op, "fp8 amax", fp8_amaxes[i], first, ScalarType::Float));
        }
        shards.push_back({static_cast<float*>(params[i].data_ptr()),
                          static_cast<float*>(exp_avgs[i].data_ptr()),
                          static_cast<float*>(exp_avg_sqs[i].data_ptr()), grads[i].data_ptr(),
                          weights.empty() ? nullptr : weights[i].data_ptr(),
                          has_fp8 ? static_cast<uint8_t*>(fp8_weights[i].data_ptr()) : nullptr,
                          scale, amax, params[i].numel()});
    }
    const Phi4AdamWStep call = {
        grad_type,
        scalar<float>(op, "grad_scale", grad_scale, first, ScalarType::Float),
        scalar<float>(op, "found_inf", found_inf, first, ScalarType::Float),
        scalar<double>(op, "lr", device_lr, first, ScalarType::Double),
        scalar<int64_t>(op, "step", device_step, first, ScalarType::Long),
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step};
    const int64_t n = shards.size();
    check_launch(op, first.is_cpu() ? phi4_adamw_host(shards.data(), n, &call)
                                    : phi4_adamw(shards.data(), n, &call, on_stream(stream)));
}

Tensor square_sum(std::vector<Tensor> tensors, int64_t stream) {
    const char* op = "square_sum";
    const Tensor& first = tensors.front();  // the dispatcher refuses an empty list
    const int type = float_type(op, "the first tensor", first);
    std::vector<const void*> pointers;
    std::vector<int64_t> sizes;
    for (const Tensor& tensor : tensors) {
        check_tensor(op, "a tensor", tensor, first);
        check_type(op, "a tensor", tensor, first.scalar_type());
        pointers.push_back(tensor.data_ptr());
        sizes.push_back(tensor.numel());
    }
    const int64_t count = phi4_square_sum_partials(sizes.data(), sizes.size());
    Tensor partials = torch::stable::new_empty(first, {count}, ScalarType::Double);
    Tensor total = torch::stable::new_empty(first, {}, ScalarType::Double);
    auto* scratch = static_cast<double*>(partials.data_ptr());
    auto* result = static_cast<double*>(total.data_ptr());
    const int64_t n = sizes.size();
    check_launch(op, first.is_cpu() ? phi4_square_sum_host(pointers.data(), sizes.data(), n, type,
                                                           scratch, result)
                                    : phi4_square_sum(pointers.data(), sizes.data(), n, type,
                                                      scratch, result, on_stream(stream)));
    return total;
}

int64_t tiles(int64_t size) { return (size + 127) / 128; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fp8_cast(const Tensor& x,
                                                            std::optional<Tensor> scale,
                                                            int64_t scaling, bool e5m2,
                                                            bool columnwise, int64_t stream) {
    const char* op = "fp8_cast";
    check_tensor(op, "x", x, x);
    STD_TORCH_CHECK(x.dim() == 2, op, ": x has ", x.dim(), " dimensions; expected 2");
    STD_TORCH_CHECK(scaling >= PHI4_PER_TENSOR && scaling <= PHI4_PER_TILE, op, ": scaling is ",
                    scaling, "; expected 0 (tensor), 1 (line) or 2 (tile)");
    STD_TORCH_CHECK(scale.has_value() == (scaling == PHI4_PER_TENSOR), op,
                    ": a scale is for tensor-wise scaling, and only for it");
    const int64_t rows = x.size(0), columns = x.size(1);
    const bool lines = scaling == PHI4_PER_LINE, blocks = scaling != PHI4_PER_TENSOR;
    const ScalarType fp8 = e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
    const auto matrix = [&](bool present, int64_t height, int64_t width, ScalarType type) {
        return torch::stable::new_empty(x, {present ? height : 0, present ? width : 0}, type);
    };
    Tensor rowwise = matrix(true, rows, columns, fp8);
    Tensor transposed = matrix(columnwise, columns, rows, fp8);
    Tensor inverse = matrix(blocks, lines ? rows : tiles(rows), tiles(columns), ScalarType::Float);
    Tensor inverse_columns = matrix(lines && columnwise, columns, tiles(rows), ScalarType::Float);
    Tensor amax = torch::stable::new_empty(x, {}, ScalarType::Float);
    const Phi4Fp8Cast call = {x.data_ptr(),
                              rows,
                              columns,
                              float_type(op, "x", x),
                              static_cast<int>(scaling),
                              e5m2,
                              scalar<float>(op, "scale", scale, x, ScalarType::Float),
                              static_cast<uint8_t*>(rowwise.data_ptr()),
                              columnwise ? static_cast<uint8_t*>(transposed.data_ptr()) : nullptr,
                              static_cast<float*>(inverse.data_ptr()),
                              static_cast<float*>(inverse_columns.data_ptr()),
                              static_cast<float*>(amax.data_ptr())};
    check_launch(op,
                 x.is_cpu() ? phi4_fp8_cast_host(&call) : phi4_fp8_cast(&call, on_stream(stream)));
    return {rowwise, transposed, inverse, inverse_columns, amax};
}

}  // namespace

STABLE_TORCH_LIBRARY(phi4_native, m) {
    m.def(
        "adamw_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor[] grads, Tensor(d!)[] weights, Tensor(e!)[] fp8_weights, Tensor[] fp8_scales, "
        "Tensor(f!)[] fp8_amaxes, Tensor? grad_scale, Tensor? found_inf, Tensor? device_lr, "
        "Tensor? device_step, float lr, float beta1, float beta2, float eps, float weight_decay, "
        "int step, int stream) -> ()");
    m.def("square_sum(Tensor[] tensors, int stream) -> Tensor");
    m.def(
        "fp8_cast(Tensor x, Tensor? scale, int scaling, bool e5m2, bool columnwise, int stream) "
        "-> (Tensor rowwise, Tensor columnwise, Tensor inverse, Tensor inverse_columns, "
        "Tensor amax)");
}

STABLE_TORCH_LIBRARY_IMPL(phi4_native, CUDA, m) {
    m.impl("adamw_", TORCH_BOX(&adamw));
    m.impl("square_sum", TORCH_BOX(&square_sum));
    m.impl("fp8_cast", TORCH_BOX(&fp8_cast));
}

STABLE_TORCH_LIBRARY_IMPL(phi4_native, CPU, m) {
    m.impl("adamw_", TORCH_BOX(&adamw));
    m.impl("square_sum", TORCH_BOX(&square_sum));
    m.impl("fp8_cast", TORCH_BOX(&fp8_cast));
}
