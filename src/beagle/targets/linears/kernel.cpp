// Products of a few vectors with a large weight, for CPUs: y[m, :] = W x[m, :] + bias, all in bf16, sums in fp32.
//
// Such a product is as fast as its weight can be read. The weight lies in tiles in the order of reading: a tile is
// 16 outputs by 32 inputs, inputs in pairs, [16 pairs][16 outputs][2], 1 KiB. What comes next is prefetched, since the
// hardware doesn't follow tile loads. An output is summed in the same order whatever the number of vectors is.
//
// Where the CPU has AMX, 16 vectors cost what one does; elsewhere AVX-512 BF16 multiplies.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

using bf16 = uint16_t;

constexpr int64_t OUT = 16, IN = 32, TILE = OUT * IN;  // of a tile: outputs, inputs, numbers
constexpr int64_t AHEAD = 2 * TILE;                    // numbers that are prefetched ahead of their use

float widened(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// 16 sums of one vector, with their bias, rounded to bf16.
void store(bf16* y, __m512 sums, const bf16* bias) {
  if (bias) {
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bias));
    sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)));
  }
  __m256bh out = _mm512_cvtneps_pbh(sums);
  std::memcpy(y, &out, 32);
}

void prefetch_tile(const bf16* tile) {
  for (int64_t i = 0; i < TILE; i += 32) _mm_prefetch(reinterpret_cast<const char*>(tile + i), _MM_HINT_T0);
}

// B blocks of 16 outputs, of R vectors.
template <int R, int B>
void avx_rows(const bf16* w, const bf16* x, bf16* y, const bf16* bias, int64_t in, int64_t out) {
  __m512 sums[B][R];
  for (auto& block : sums)
    for (auto& sum : block) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < in; k += 2) {
    __m512bh weights[B];
    for (int j = 0; j < B; j++) {
      const bf16* p = w + j * in * OUT + k * OUT;
      _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD), _MM_HINT_T0);
      weights[j] = (__m512bh)_mm512_load_si512(p);
    }
    for (int m = 0; m < R; m++) {
      int32_t pair;
      std::memcpy(&pair, x + m * in + k, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < B; j++) sums[j][m] = _mm512_dpbf16_ps(sums[j][m], weights[j], both);
    }
  }
  for (int j = 0; j < B; j++)
    for (int m = 0; m < R; m++) store(y + m * out + j * OUT, sums[j][m], bias ? bias + j * OUT : nullptr);
}

template <int B>
void avx(const bf16* w, const bf16* x, bf16* y, const bf16* bias, int64_t rows, int64_t in, int64_t out) {
  for (; rows > 0; rows -= 8, x += 8 * in, y += 8 * out) switch (std::min<int64_t>(rows, 8)) {
      case 1: avx_rows<1, B>(w, x, y, bias, in, out); break;
      case 2: avx_rows<2, B>(w, x, y, bias, in, out); break;
      case 3: avx_rows<3, B>(w, x, y, bias, in, out); break;
      case 4: avx_rows<4, B>(w, x, y, bias, in, out); break;
      case 5: avx_rows<5, B>(w, x, y, bias, in, out); break;
      case 6: avx_rows<6, B>(w, x, y, bias, in, out); break;
      case 7: avx_rows<7, B>(w, x, y, bias, in, out); break;
      default: avx_rows<8, B>(w, x, y, bias, in, out);
    }
}

#ifdef __AMX_BF16__

// Linux lets a process use the tiles' registers only after it asked for them.
bool has_tiles() {
  static const bool asked = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return asked;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 vectors, 6 and 7 weights; 1, 3 and 5 belong to the second 16 of up to 32 vectors.
void shape_tiles(int64_t rows) {
  TileShapes shapes;
  for (int i = 0; i < 8; i++) {
    int64_t second = rows > 16 ? rows - 16 : 1;
    shapes.rows[i] = i >= 6 ? 16 : (i & 1) ? second : std::min<int64_t>(rows, 16);
    shapes.bytes[i] = 64;
  }
  _tile_loadconfig(&shapes);
}

// BOTH: two blocks of 16 outputs, else one; MORE: over 16 vectors, up to 32.
template <bool BOTH, bool MORE>
void tiles(const bf16* w, const bf16* x, bf16* y, const bf16* bias, int64_t rows, int64_t in, int64_t out) {
  const bf16* second = w + in * OUT;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < in; k += IN) {
    prefetch_tile(w + k * OUT + AHEAD);
    _tile_loadd(4, x + k, in * 2);
    if (MORE) _tile_loadd(5, x + 16 * in + k, in * 2);
    _tile_loadd(6, w + k * OUT, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (MORE) _tile_dpbf16ps(1, 5, 6);
    if (BOTH) {
      prefetch_tile(second + k * OUT + AHEAD);
      _tile_loadd(7, second + k * OUT, 64);
      _tile_dpbf16ps(2, 4, 7);
      if (MORE) _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[4][16][16];
  _tile_stored(0, sums[0], 64);
  if (MORE) _tile_stored(1, sums[1], 64);
  if (BOTH) _tile_stored(2, sums[2], 64);
  if (BOTH && MORE) _tile_stored(3, sums[3], 64);
  for (int j = 0; j < 1 + BOTH; j++)
    for (int64_t m = 0; m < rows; m++)
      store(y + m * out + j * OUT, _mm512_load_ps(sums[2 * j + m / 16][m % 16]), bias ? bias + j * OUT : nullptr);
}

#endif

// Blocks of 16 outputs, of one thread.
void share(const bf16* w, const bf16* x, bf16* y, const bf16* bias, int64_t rows, int64_t in, int64_t out, int64_t from,
           int64_t to) {
  int64_t shaped = 0;
  for (int64_t b = from; b < to; b += 2) {
    const bf16 *weights = w + b * in * OUT, *added = bias ? bias + b * OUT : nullptr;
    const bool both = to - b > 1;
#ifdef __AMX_BF16__
    if (has_tiles()) {
      for (int64_t m = 0; m < rows; m += 32) {  // the weights of two blocks stay in the cache
        const int64_t some = std::min<int64_t>(rows - m, 32);
        if (some != shaped) shape_tiles(shaped = some);
        auto run = some > 16 ? (both ? tiles<true, true> : tiles<false, true>)
                             : (both ? tiles<true, false> : tiles<false, false>);
        run(weights, x + m * in, y + m * out + b * OUT, added, some, in, out);
      }
      continue;
    }
#endif
    (both ? avx<2> : avx<1>)(weights, x, y + b * OUT, added, rows, in, out);
  }
#ifdef __AMX_BF16__
  if (shaped) _tile_release();  // other libraries shape them for themselves
#endif
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

// The same for a graph that inductor compiled: weight [out, in], y new.
AOTITorchError aoti_torch_cpu_tiled_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                           AtenTensorHandle* y) {
  void *from, *tiles, *added = nullptr, *to;
  int64_t numel, *sizes;
  int32_t type;
  aoti_torch_get_data_ptr(x, &from);
  aoti_torch_get_numel(x, &numel);
  aoti_torch_get_dtype(x, &type);
  aoti_torch_get_data_ptr(weight, &tiles);
  aoti_torch_get_sizes(weight, &sizes);
  if (bias) aoti_torch_get_data_ptr(*bias, &added);
  const int64_t out = sizes[0], in = sizes[1], shape[2] = {numel / in, out}, strides[2] = {out, 1};
  AOTITorchError error = aoti_torch_empty_strided(2, shape, strides, type, aoti_torch_device_type_cpu(), 0, y);
  if (error) return error;
  aoti_torch_get_data_ptr(*y, &to);
  tiled_linear(from, tiles, added, to, shape[0], in, out);
  return AOTI_TORCH_SUCCESS;
}
}
