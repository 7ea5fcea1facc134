// Tiles of weights, 1 KiB each, as products of a few vectors read them; see half.h, products.h.
//
// A tile is 16 outputs by 32 inputs of bf16, inputs in pairs, [16 pairs][16 outputs][2]; or 16 outputs by 64 inputs of int8,
// inputs in fours, [16 fours][16 outputs][4].

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

using bf16 = uint16_t;

constexpr int64_t LINE = 64;  // bytes of a line of the cache, and of a row of a tile

// Memory that begins with a line: a tile whose rows cross lines takes six times as long to load.
template <typename T>
struct Lines {
  using value_type = T;

  Lines() = default;
  template <typename U>
  Lines(const Lines<U>&) {}

  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(LINE))); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t(LINE)); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};

template <typename T>
using Lined = std::vector<T, Lines<T>>;

constexpr int64_t OUT = 16, IN = 32;  // outputs and bf16 inputs of a tile
constexpr int64_t TILE = 1024;        // bytes
constexpr int64_t AHEAD = 2 * TILE;   // bytes that are prefetched ahead of their use

void prefetch(const void* line) { _mm_prefetch(static_cast<const char*>(line) + AHEAD, _MM_HINT_T0); }

// For weights that are unpacked before they are multiplied: farther ahead, into the second cache.
void prefetch_far(const void* line) { _mm_prefetch(static_cast<const char*>(line) + 4 * AHEAD, _MM_HINT_T1); }

void prefetch_tile(const void* tile) {
  for (int64_t i = 0; i < TILE; i += LINE) _mm_prefetch(static_cast<const char*>(tile) + i, _MM_HINT_T0);
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

// Memory that tiles or their shapes are loaded from is written by now: GCC's intrinsics don't say that they read it, so it may
// leave that for later.
inline void written() { __asm__ volatile("" : : : "memory"); }

// Tiles 0 to 3 are sums, 4 and 5 vectors, 6 and 7 weights; 1, 3 and 5 belong to the second of two groups of vectors. They
// keep their shape from product to product, and have none in the end: other libraries shape them for themselves.
class Shaped {
 public:
  Shaped() = default;
  Shaped(const Shaped&) = delete;

  ~Shaped() {
    if (first) _tile_release();
  }

  void of(int64_t rows, int64_t more) {
    if (rows == first && more == second) return;
    first = rows, second = more;
    TileShapes shapes;
    for (int i = 0; i < 8; i++) {
      shapes.rows[i] = i >= 6 ? 16 : (i & 1) ? more : rows;
      shapes.bytes[i] = 64;
    }
    written();
    _tile_loadconfig(&shapes);
  }

 private:
  int64_t first = 0, second = 0;
};

#else

struct Shaped {};

#endif

}  // namespace
