// The last keys of a tree's tokens, put in order for several tokens at once.
//
// Behind whole blocks of the context, which all tokens share, each sees the rest of the context and the nodes of its path.
// Its sums are those of a token alone behind its path: AMX sums a block's even keys and its odd ones in their order, then both
// to the blocks before, and a key of weight 0 adds nothing. So the nodes of several paths share a block, where each node lies
// in the block of its position, at an even or odd place as its position is, behind its ancestors. A sheet is tokens whose paths
// have room in the same blocks. Without AMX each token has a sheet of its own.
//
// A weight of 0 makes no NaN nothing: values that are no numbers are left out of a block, and spoil those who see them alone.

#pragma once

#include <array>

#include "attention.h"

namespace {

// Tokens beside each other that share blocks.
struct Sheet {
  int64_t first, tokens = 0;
  std::vector<int64_t> slots;  // of the cache, of each place in blocks; -1: nothing lies there
};

// Tokens of a sheet whose queries are multiplied together.
struct Task {
  int64_t sheet, first, tokens;
};

// Whether all of a value are numbers, d of them.
bool is_finite(const bf16* value, int64_t d) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  for (int64_t k = 0; k < d; k += 32)
    if (_mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(value + k), exponent), exponent)) return false;
  return true;
}

class Sheets {
 public:
  std::vector<Sheet> sheets;
  std::vector<Task> tasks;
  std::vector<Path> near, far;  // of each token: of the first chunk behind the shared ones, and of the second

  // Trees behind a context; of each token the nodes from the root to itself. The first `base` keys lie in chunks that all
  // tokens share; `group` queries of a token meet a cached head.
  Sheets(const std::vector<std::vector<int64_t>>& paths, int64_t context, int64_t base, int64_t group)
      : whole((context - base) / BLOCK), rest((context - base) % BLOCK), context(context) {
#ifdef __AMX_BF16__
    const bool shared = has_tiles();
#else
    const bool shared = false;
#endif
    for (size_t m = 0; m < paths.size(); m++) {
      if (sheets.empty() || !shared || !has_room(paths[m])) begin(m);
      add(paths[m]);
    }
    const int64_t most = std::max<int64_t>(1, 16 / group);
    for (size_t s = 0; s < sheets.size(); s++)
      for (int64_t m = 0; m < sheets[s].tokens; m += most)
        tasks.push_back({int64_t(s), sheets[s].first + m, std::min(most, sheets[s].tokens - m)});
  }

  // Keys in whole blocks that all tokens see, behind the shared chunks.
  int64_t before() const { return whole * BLOCK; }

  // Places of a sheet in the first chunk.
  int64_t places_near(const Sheet& sheet) const { return std::min<int64_t>(sheet.slots.size(), CHUNK - before()); }

 private:
  using Free = std::vector<std::array<int64_t, 2>>;  // of each block, the next even place and the next odd one

  const int64_t whole, rest, context;
  std::vector<int64_t> place;  // of each node in the sheet, or -1
  Free free;

  void begin(int64_t first) {
    sheets.push_back({first});
    std::fill(place.begin(), place.end(), -1);
    free.clear();
    for (int64_t i = 0; i < rest; i++) at(i) = context - rest + i;
    if (rest) free[0] = {rest + rest % 2, rest + 1 - rest % 2};
  }

  // What lies at a place, whose block is made if there is none.
  int64_t& at(int64_t i) {
    std::vector<int64_t>& slots = sheets.back().slots;
    for (; int64_t(slots.size()) <= i; free.push_back({0, 1})) slots.resize(slots.size() + BLOCK, -1);
    return slots[i];
  }

  bool is_placed(int64_t node) const { return node < int64_t(place.size()) && place[node] >= 0; }

  bool has_room(const std::vector<int64_t>& path) const {
    Free left = free;
    for (size_t t = 0; t < path.size(); t++) {
      const size_t i = rest + t, block = i / BLOCK;
      if (is_placed(path[t])) continue;
      if (block >= left.size()) break;  // blocks of its own
      if (left[block][i % 2] >= BLOCK) return false;
      left[block][i % 2] += 2;
    }
    return true;
  }

  void add(const std::vector<int64_t>& path) {
    Sheet& sheet = sheets.back();
    const int64_t count = rest + path.size(), own = (count + BLOCK - 1) / BLOCK, first = CHUNK / BLOCK - whole;
    std::vector<Places> blocks(own);
    for (int64_t i = 0; i < count; i++) {
      const int64_t found = i < rest ? i : place_of(path[i - rest], i);
      Places& places = blocks[i / BLOCK];
      places.place[i % BLOCK] = int32_t(found % BLOCK);
      places.key[found % BLOCK] = int16_t(i % BLOCK);
      places.seen |= uint32_t(1) << found % BLOCK;
    }
    const auto middle = blocks.begin() + std::min(own, first);
    near.push_back({std::min(before() + count, CHUNK), whole, {blocks.begin(), middle}});
    far.push_back({std::max<int64_t>(0, before() + count - CHUNK), 0, {middle, blocks.end()}});
    sheet.tokens++;
  }

  // Where a node lies, whose key is the i-th behind the whole blocks.
  int64_t place_of(int64_t node, int64_t i) {
    if (node >= int64_t(place.size())) place.resize(node + 1, -1);
    if (place[node] >= 0) return place[node];
    at(i);
    int64_t& next = free[i / BLOCK][i % 2];
    place[node] = i / BLOCK * BLOCK + next;
    next += 2;
    at(place[node]) = context + node;
    return place[node];
  }
};

}  // namespace
