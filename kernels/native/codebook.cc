#include "codebook.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace tilewright {
namespace {

// Everything between here and the instruction sets is written once in vectors of `lanes` floats, and must be inlined
// into a function of the instruction set whose registers are that wide.
#define INLINE [[gnu::always_inline]] inline

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr int32_t nothing = std::numeric_limits<int32_t>::max();
constexpr int32_t ramp[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Channels are packed in pieces of which the first-level cache holds all columns, and summed in pieces so that rounding
// does not grow with their number: as ONNX Runtime's own products do it, so both choose alike.
constexpr int64_t piece = 256;

// The greatest score so far and its index, lane by lane.
template <int lanes>
struct Winner {
  // aligned in so many words: else GCC, where registers are narrower, aligns to less than wide ones then assume
  typedef float Floats __attribute__((vector_size(4 * lanes), aligned(4 * lanes)));
  typedef int32_t Ints __attribute__((vector_size(4 * lanes), aligned(4 * lanes)));

  Floats score = Floats{} - infinity;
  Ints index = Ints{} + nothing;

  // Indices must come in falling order: so the lowest among equals wins, even at minus infinity, and NaN never does.
  INLINE void offer(const Floats& scores, int32_t first) {
    Ints indices;
    std::memcpy(&indices, ramp, sizeof indices);
    indices += first;
    const Ints better = scores >= score;
    score = better ? scores : score;
    index = better ? indices : index;
  }

  INLINE int32_t lowest() const {
    float scores[lanes];
    int32_t indices[lanes], lowest = nothing;
    std::memcpy(scores, &score, sizeof scores);
    std::memcpy(indices, &index, sizeof indices);
    const float best = *std::max_element(scores, scores + lanes);
    for (int lane = 0; lane < lanes; lane++) {
      if (scores[lane] == best) lowest = std::min(lowest, indices[lane]);
    }
    return lowest == nothing ? 0 : lowest;
  }
};

// scores[r, k] = rows[r] . weight[k] + bias[k]
struct Products {
  const float* rows;  // [count, channels], `stride` apart
  int64_t count, stride, channels;
  const float* weight;  // [size, channels]
  int64_t size;
  const float* bias;  // [size], or null for zeros
  bool distances;     // the bias is -|weight[k]|^2 / 2 instead
};

// A few rows of the weight turned on their side, so that one channel of all is a vector, and their biases.
template <int columns>
struct Panel {
  struct alignas(64) Channel {
    float weight[columns];
  };
  std::vector<Channel> channels;
  alignas(64) float bias[columns];

  INLINE void load(const Products& from, int64_t first) {
    const int64_t depth = from.channels, count = std::min<int64_t>(columns, from.size - first);
    for (int64_t begin = 0; begin < depth; begin += piece) {
      for (int64_t k = 0; k < count; k += 4) {
        for (int64_t c = begin; c < std::min(begin + piece, depth); c += 4) {
          turn(from.weight + (first + k) * depth + c, depth, std::min<int64_t>(4, count - k),
               std::min<int64_t>(4, depth - c), &channels[c], k);
        }
      }
    }
    for (int64_t k = 0; k < columns; k++) {
      // beyond the last column is NaN, which never wins
      bias[k] = k >= count ? std::numeric_limits<float>::quiet_NaN() : from.bias ? from.bias[first + k] : 0;
    }
    if (!from.distances) return;
    for (const Channel& channel : channels) {
      for (int64_t k = 0; k < columns; k++) bias[k] -= channel.weight[k] * channel.weight[k] / 2;
    }
  }

  INLINE static void turn(const float* from, int64_t stride, int64_t rows, int64_t depth, Channel* to, int64_t k) {
    if (rows == 4 && depth == 4) {  // in registers
      float block[4][4];
      for (int64_t r = 0; r < 4; r++) {
        for (int64_t c = 0; c < 4; c++) block[c][r] = from[r * stride + c];
      }
      for (int64_t c = 0; c < 4; c++) std::memcpy(to[c].weight + k, block[c], sizeof block[c]);
    } else {
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < depth; c++) to[c].weight[k + r] = from[r * stride + c];
      }
    }
  }
};

// Scores of `tall` rows by `wide` vectors, in registers.
template <int lanes, int tall, int wide>
struct Tile {
  using Floats = typename Winner<lanes>::Floats;
  Floats score[tall][wide] = {};

  INLINE void add_products(const float* const* row, const Panel<lanes * wide>& panel, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      Floats weight[wide];
      for (int v = 0; v < wide; v++) std::memcpy(&weight[v], panel.channels[c].weight + v * lanes, sizeof(Floats));
      for (int r = 0; r < tall; r++) {
        for (int v = 0; v < wide; v++) score[r][v] += row[r][c] * weight[v];
      }
    }
  }

  INLINE void add_bias(const Panel<lanes * wide>& panel) {
    for (int v = 0; v < wide; v++) {
      Floats bias;
      std::memcpy(&bias, panel.bias + v * lanes, sizeof(Floats));
      for (int r = 0; r < tall; r++) score[r][v] += bias;
    }
  }

  INLINE void add(const Tile& other) {
    for (int r = 0; r < tall; r++) {
      for (int v = 0; v < wide; v++) score[r][v] += other.score[r][v];
    }
  }
};

// One panel of the weight at a time is packed, stays in the second-level cache and meets all rows; only each row's
// winner so far is kept.
template <int lanes, int tall, int wide>
INLINE void best_products(const Products& from, int32_t* indices, int64_t step) {
  constexpr int columns = lanes * wide;
  Panel<columns> panel{std::vector<typename Panel<columns>::Channel>(from.channels), {}};
  std::vector<Winner<lanes>> winners((from.count + tall - 1) / tall * tall);
  for (int64_t first = (from.size - 1) / columns * columns; first >= 0; first -= columns) {
    panel.load(from, first);
    for (int64_t begin = 0; begin < from.count; begin += tall) {
      const float* row[tall];
      for (int64_t r = 0; r < tall; r++) {  // the last row again fills the last tile
        row[r] = from.rows + std::min(begin + r, from.count - 1) * from.stride;
      }
      Tile<lanes, tall, wide> tile;
      tile.add_products(row, panel, 0, std::min(piece, from.channels));
      tile.add_bias(panel);
      for (int64_t c = piece; c < from.channels; c += piece) {
        Tile<lanes, tall, wide> more;
        more.add_products(row, panel, c, std::min(c + piece, from.channels));
        tile.add(more);
      }
      for (int r = 0; r < tall; r++) {
        Winner<lanes> winner = winners[begin + r];
        for (int v = wide - 1; v >= 0; v--) winner.offer(tile.score[r][v], static_cast<int32_t>(first + v * lanes));
        winners[begin + r] = winner;
      }
    }
  }
  for (int64_t r = 0; r < from.count; r++) indices[r * step] = winners[r].lowest();
}

template <int lanes>
INLINE int32_t best_of(const float* scores, int64_t size) {
  using Floats = typename Winner<lanes>::Floats;
  Winner<lanes> winner;
  const int64_t rest = size % lanes;
  Floats last = Floats{} + std::numeric_limits<float>::quiet_NaN();
  std::memcpy(&last, scores + size - rest, rest * sizeof(float));
  winner.offer(last, static_cast<int32_t>(size - rest));
  for (int64_t k = size - rest - lanes; k >= 0; k -= lanes) {
    Floats here;
    std::memcpy(&here, scores + k, sizeof here);
    winner.offer(here, static_cast<int32_t>(k));
  }
  return winner.lowest();
}

struct InstructionSet {
  const char* name;
  bool here;
  void (*best_products)(const Products& from, int32_t* indices, int64_t step);
  int32_t (*best_of)(const float* scores, int64_t size);
};

#ifdef __x86_64__
[[gnu::target("avx512f")]] void best_products_avx512(const Products& from, int32_t* indices, int64_t step) {
  best_products<16, 8, 3>(from, indices, step);
}
[[gnu::target("avx512f")]] int32_t best_of_avx512(const float* scores, int64_t size) {
  return best_of<16>(scores, size);
}
[[gnu::target("avx2,fma")]] void best_products_avx2(const Products& from, int32_t* indices, int64_t step) {
  best_products<8, 4, 3>(from, indices, step);
}
[[gnu::target("avx2,fma")]] int32_t best_of_avx2(const float* scores, int64_t size) { return best_of<8>(scores, size); }
#endif
void best_products_scalar(const Products& from, int32_t* indices, int64_t step) {
  best_products<4, 4, 2>(from, indices, step);
}
int32_t best_of_scalar(const float* scores, int64_t size) { return best_of<4>(scores, size); }
#undef INLINE

const InstructionSet& chosen() {
  static const InstructionSet sets[] = {
#ifdef __x86_64__
      {"avx512", __builtin_cpu_supports("avx512f") != 0, best_products_avx512, best_of_avx512},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), best_products_avx2, best_of_avx2},
#endif
      {"scalar", true, best_products_scalar, best_of_scalar},  // what the compiler takes for granted
  };
  static const InstructionSet& chosen = []() -> const InstructionSet& {
    const char* asked = std::getenv("TILEWRIGHT_SIMD");
    for (const InstructionSet& set : sets) {
      if (set.here && (!asked || !std::strcmp(asked, set.name))) return set;
    }
    std::string names;
    for (const InstructionSet& set : sets) names += set.here ? std::string(" ") + set.name : "";
    throw std::invalid_argument(std::string("TILEWRIGHT_SIMD=") + asked + ": this CPU has" + names);
  }();
  return chosen;
}

void copy_codes(const Codebook& codebook, const Choice& choice, const Block& block) {
  for (int64_t row = block.begin; row < block.end; row++) {
    const int64_t at = row * codebook.groups + block.group;
    const float* code = codebook.codes + (block.group * codebook.size + choice.indices[at]) * codebook.width;
    std::copy_n(code, codebook.width, choice.codes + at * codebook.width);
  }
}

void choose(const Products& products, const Codebook& codebook, const Choice& choice, const Block& block) {
  int32_t* indices = choice.indices + block.begin * codebook.groups + block.group;
  chosen().best_products(products, indices, codebook.groups);
  copy_codes(codebook, choice, block);
}

}  // namespace

const char* instruction_set() { return chosen().name; }

void choose_nearest(const float* latents, const Codebook& codebook, const Choice& choice, const Block& block) {
  Products products{};
  products.stride = codebook.groups * codebook.width;
  products.rows = latents + block.begin * products.stride + block.group * codebook.width;
  products.count = block.end - block.begin;
  products.channels = codebook.width;
  products.weight = codebook.codes + block.group * codebook.size * codebook.width;
  products.size = codebook.size;
  products.distances = true;
  choose(products, codebook, choice, block);
}

void choose_from_hidden(const float* hidden, int64_t channels, const float* weight, const float* bias,
                        const Codebook& codebook, const Choice& choice, const Block& block) {
  Products products{};
  products.stride = products.channels = channels;
  products.rows = hidden + block.begin * channels;
  products.count = block.end - block.begin;
  products.weight = weight + block.group * codebook.size * channels;
  products.size = codebook.size;
  products.bias = bias ? bias + block.group * codebook.size : nullptr;
  choose(products, codebook, choice, block);
}

void choose_from_logits(const float* logits, const Codebook& codebook, const Choice& choice, const Block& block) {
  for (int64_t row = block.begin; row < block.end; row++) {
    const int64_t at = row * codebook.groups + block.group;
    choice.indices[at] = chosen().best_of(logits + at * codebook.size, codebook.size);
  }
  copy_codes(codebook, choice, block);
}

}  // namespace tilewright
