// Products of a few vectors with a large weight for PyTorch and for graphs that inductor compiled, see products.h.

#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "products.h"

namespace {

void* data(AtenTensorHandle tensor) {
  void* out = nullptr;
  aoti_torch_get_data_ptr(tensor, &out);
  return out;
}

// y [rows, out] like x [rows, in], for a weight [out, …]; shape becomes rows, out, in.
AOTITorchError new_output(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* y, int64_t* shape) {
  int64_t *sizes, *outputs;
  int32_t type;
  aoti_torch_get_dtype(x, &type);
  aoti_torch_get_sizes(x, &sizes);
  aoti_torch_get_sizes(weight, &outputs);
  shape[0] = sizes[0];
  shape[1] = outputs[0];
  shape[2] = sizes[1];
  const int64_t strides[2] = {shape[1], 1};
  return aoti_torch_empty_strided(2, shape, strides, type, aoti_torch_device_type_cpu(), 0, y);
}

}  // namespace

extern "C" {

// y [rows, out] = x [rows, in] · weight + bias [out] or null; the weight in tiles, 64-byte aligned; in a multiple of
// 32, out of 16.
void tiled_linear(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t in, int64_t out) {
  const int64_t blocks = out / OUT, pairs = (blocks + 1) / 2;
  const int threads = int(std::min<int64_t>(omp_get_max_threads(), pairs));
#pragma omp parallel num_threads(threads)
  {
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    share(static_cast<const bf16*>(weight), static_cast<const bf16*>(x), static_cast<bf16*>(y),
          static_cast<const bf16*>(bias), rows, in, out, pairs * i / n * 2, std::min(pairs * (i + 1) / n * 2, blocks));
  }
}

// The same with int8 weights, which `scales [out]` scale and whose sums are `sums [out]`; in a multiple of 64.
void tiled_linear_int8(const void* x, const void* weight, const float* scales, const int32_t* sums, const void* bias,
                       void* y, int64_t rows, int64_t in, int64_t out) {
  const int64_t blocks = out / OUT, pairs = (blocks + 1) / 2;
  const int threads = int(std::min<int64_t>(omp_get_max_threads(), pairs));
#pragma omp parallel num_threads(threads)
  {
    thread_local Whole whole;
    whole.of(static_cast<const bf16*>(x), rows, in);  // each thread for itself: waiting for another takes longer
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    share_whole(static_cast<const int8_t*>(weight), whole, static_cast<bf16*>(y), scales, sums,
                static_cast<const bf16*>(bias), rows, in, out, pairs * i / n * 2,
                std::min(pairs * (i + 1) / n * 2, blocks));
  }
}

// The same with int4 weights; in a multiple of 64.
void tiled_linear_int4(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t in,
                       int64_t out) {
  const int64_t blocks = out / OUT;
  const int threads = int(std::min<int64_t>(omp_get_max_threads(), blocks));
#pragma omp parallel num_threads(threads)
  {
    thread_local GroupSums sums;
    sums.of(static_cast<const bf16*>(x), rows, in);
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    share_int4(static_cast<const uint8_t*>(weight), static_cast<const bf16*>(x), sums, static_cast<bf16*>(y),
               static_cast<const bf16*>(bias), rows, in, out, blocks * i / n, blocks * (i + 1) / n);
  }
}

// The same three for graphs that inductor compiled: weight [out, in], in int4 [out, in * 5 / 8] bytes; y new.
AOTITorchError aoti_torch_cpu_tiled_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                           AtenTensorHandle* y) {
  int64_t shape[3];
  AOTITorchError error = new_output(x, weight, y, shape);
  if (!error) tiled_linear(data(x), data(weight), bias ? data(*bias) : nullptr, data(*y), shape[0], shape[2], shape[1]);
  return error;
}

AOTITorchError aoti_torch_cpu_tiled_linear_int8(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scales,
                                                AtenTensorHandle sums, AtenTensorHandle* bias, AtenTensorHandle* y) {
  int64_t shape[3];
  AOTITorchError error = new_output(x, weight, y, shape);
  if (!error)
    tiled_linear_int8(data(x), data(weight), static_cast<const float*>(data(scales)),
                      static_cast<const int32_t*>(data(sums)), bias ? data(*bias) : nullptr, data(*y), shape[0],
                      shape[2], shape[1]);
  return error;
}

AOTITorchError aoti_torch_cpu_tiled_linear_int4(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                                AtenTensorHandle* y) {
  int64_t shape[3];
  AOTITorchError error = new_output(x, weight, y, shape);
  if (!error)
    tiled_linear_int4(data(x), data(weight), bias ? data(*bias) : nullptr, data(*y), shape[0], shape[2], shape[1]);
  return error;
}
}
