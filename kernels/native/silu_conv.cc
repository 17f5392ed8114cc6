#include "silu_conv.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
#include <utility>

#include "codebook.h"

// What passes vectors here is inlined, so that no calling convention matters.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace tilewright {
namespace {

// As in codebook.cc: written once in vectors of `lanes` floats, inlined into a function of each instruction set.
#define INLINE [[gnu::always_inline]] inline

// A tile is 2 rows by 4 columns of the output. It sees 4 by 6 pixels of the input, which become as many sums; those of
// one place in all tiles and channels are a matrix.
constexpr int64_t tall = 2, wide = 4, sums_down = 4, sums_across = 6, sums = sums_down * sums_across;

constexpr int64_t outputs_at_once = 16;   // share the sums of the input
constexpr int64_t columns_at_once = 8;    // enough tiles to make up for the sums of the weight
constexpr int64_t strip_bytes = 4 << 20;  // of sums, which stay in the last-level cache,
constexpr int64_t strip_tiles = 256;      // but no fewer tiles than this
constexpr int64_t piece = 128;            // channels that the first-level cache holds, and rounding does not grow with
constexpr int64_t soon = 32;              // channels until what is fetched is used

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int lanes>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * lanes), aligned(4 * lanes)));
  typedef int32_t Ints __attribute__((vector_size(4 * lanes), aligned(4 * lanes)));

  INLINE static Floats load(const float* from) {
    Floats vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
  }
  INLINE static void store(float* to, const Floats& vector) { std::memcpy(to, &vector, sizeof vector); }

  template <class T, int... k>
  INLINE static void unzip(const T& a, const T& b, T& even, T& odd, std::integer_sequence<int, k...>) {
    even = __builtin_shufflevector(a, b, (2 * k)...);
    odd = __builtin_shufflevector(a, b, (2 * k + 1)...);
  }
  template <class T, int... k>
  INLINE static void zip(const T& a, const T& b, T& low, T& high, std::integer_sequence<int, k...>) {
    low = __builtin_shufflevector(a, b, (k / 2 + k % 2 * lanes)...);
    high = __builtin_shufflevector(a, b, (k / 2 + k % 2 * lanes + lanes / 2)...);
  }

  // phases[i][k] = pixels[4 * k + i], and back
  INLINE static void to_phases(const Floats (&pixels)[4], Floats (&phases)[4]) {
    constexpr auto all = std::make_integer_sequence<int, lanes>();
    Floats even[2], odd[2];
    unzip(pixels[0], pixels[1], even[0], odd[0], all);
    unzip(pixels[2], pixels[3], even[1], odd[1], all);
    unzip(even[0], even[1], phases[0], phases[2], all);
    unzip(odd[0], odd[1], phases[1], phases[3], all);
  }
  INLINE static void store_phases(float* to, const Floats (&phases)[4]) {
    constexpr auto all = std::make_integer_sequence<int, lanes>();
    Floats even[2], odd[2], out[4];
    zip(phases[0], phases[2], even[0], even[1], all);
    zip(phases[1], phases[3], odd[0], odd[1], all);
    zip(even[0], odd[0], out[0], out[1], all);
    zip(even[1], odd[1], out[2], out[3], all);
    for (int k = 0; k < 4; k++) store(to + k * lanes, out[k]);
  }

  INLINE static Floats silu(const Floats& v) {
    // e^-v = 2^n * e^r with |r| <= ln 2 / 2
    Floats power = v < -88.5f ? Floats{} + 88.5f : v > 80.f ? Floats{} - 80.f : -v;
    const Floats shifted = power * 1.44269504f + 12582912.f;  // the low bits are n, rounded
    const Floats n = shifted - 12582912.f;
    const Floats r = (power - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats e = 1.9875691500e-4f * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * (r * r) + r + 1.f;
    Ints bits, count;
    std::memcpy(&bits, &e, sizeof e);
    std::memcpy(&count, &shifted, sizeof count);
    bits += count << 23;
    std::memcpy(&e, &bits, sizeof e);
    return v / (1.f + (v < -88.5f ? Floats{} + std::numeric_limits<float>::infinity() : e));
  }
};

// Across, the polynomials meet at 0, +-3/4, +-3/2 and infinity: on random data these round 4 times less than the usual
// 0, +-1, +-2. Down, at 0, +-1 and infinity.
constexpr float a = 0.75f, b = 1.5f, aa = a * a, bb = b * b;

template <class T>
INLINE void sums_of_input(const T (&d)[6], T (&to)[6]) {
  const T even_a = d[4] - bb * d[2], odd_a = d[3] - bb * d[1];
  const T even_b = d[4] - aa * d[2], odd_b = d[3] - aa * d[1];
  to[0] = aa * bb * d[0] + (d[4] - (aa + bb) * d[2]);
  to[1] = even_a + a * odd_a;
  to[2] = even_a - a * odd_a;
  to[3] = even_b + b * odd_b;
  to[4] = even_b - b * odd_b;
  to[5] = aa * bb * d[1] + (d[5] - (aa + bb) * d[3]);
}
template <class T>
INLINE void sums_of_input(const T (&d)[4], T (&to)[4]) {
  to[0] = d[0] - d[2];
  to[1] = d[1] + d[2];
  to[2] = d[2] - d[1];
  to[3] = d[3] - d[1];
}

template <class T>
INLINE void sums_of_weight(const T (&g)[3], T (&to)[6]) {
  constexpr float at_a = 1 / (2 * aa * (aa - bb)), at_b = 1 / (2 * bb * (bb - aa));
  const T even_a = at_a * g[0] + at_a * aa * g[2], even_b = at_b * g[0] + at_b * bb * g[2];
  to[0] = g[0] * (1 / (aa * bb));
  to[1] = even_a + at_a * a * g[1];
  to[2] = even_a - at_a * a * g[1];
  to[3] = even_b + at_b * b * g[1];
  to[4] = even_b - at_b * b * g[1];
  to[5] = g[2];
}
template <class T>
INLINE void sums_of_weight(const T (&g)[3], T (&to)[4]) {
  const T even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
  to[0] = g[0];
  to[1] = even + odd;
  to[2] = even - odd;
  to[3] = g[2];
}

template <class T>
INLINE void output_of_sums(const T (&m)[6], T (&to)[4]) {
  const T even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  to[0] = m[0] + even_a + even_b;
  to[1] = a * odd_a + b * odd_b;
  to[2] = aa * even_a + bb * even_b;
  to[3] = a * aa * odd_a + (b * bb * odd_b + m[5]);
}
template <class T>
INLINE void output_of_sums(const T (&m)[4], T (&to)[2]) {
  to[0] = m[0] + (m[1] + m[2]);
  to[1] = m[3] + (m[1] - m[2]);
}

// Whole rows of tiles of one image, counted row by row.
struct Strip {
  int64_t image, first, rows, across;

  int64_t tiles() const { return rows * across; }
};

// The sums of all channels of a strip, in columns of tiles that fill registers: [columns, sums, channels, column].
template <int lanes>
constexpr int64_t column = 3 * lanes;

// Memory that is not cleared.
struct Scratch {
  explicit Scratch(int64_t size) : floats(new (std::align_val_t(64)) float[size]) {}
  ~Scratch() { operator delete[](floats, std::align_val_t(64)); }
  float* const floats;
};

template <int lanes>
INLINE void transform_input(const SiluConv& conv, const Strip& strip, int64_t channel, float* to) {
  using V = Vector<lanes>;
  using Floats = typename V::Floats;
  const int64_t across = strip.across, padded = divide_up(across, lanes) * lanes;
  const int64_t phase = padded + 2 * lanes;                  // every fourth pixel of a row, between zeros
  const int64_t parity = (strip.rows + 1) * across + lanes;  // every other row's sums of one place
  const Scratch scratch(4 * phase + 2 * sums_across * parity);
  float* const phases = scratch.floats + lanes;
  float* const half[2] = {scratch.floats + 4 * phase, scratch.floats + 4 * phase + sums_across * parity};
  const int64_t plane = strip.image * conv.channels + channel;
  const float* const image = conv.x + plane * conv.height * conv.width;
  const float scale = conv.scale[plane], shift = conv.shift[plane];
  std::fill_n(scratch.floats, 4 * phase, 0.f);

  for (int64_t k = 0; k < tall * (strip.rows + 1); k++) {
    const int64_t y = strip.first * tall - 1 + k;
    float* const sums_of_row = half[k % 2] + k / 2 * across;
    if (y < 0 || y >= conv.height) {  // padding is zero behind SiLU
      for (int64_t i = 0; i < sums_across; i++) std::fill_n(sums_of_row + i * parity, across, 0.f);
      continue;
    }
    const float* const from = image + y * conv.width;
    for (int64_t t = 0; t < padded; t += lanes) {
      const int64_t left = conv.width - wide * t;
      Floats pixels[4], four[4];
      if (left >= 4 * lanes) {
        for (int64_t i = 0; i < 4; i++) {
          __builtin_prefetch(from + wide * t + i * lanes + conv.width);  // of the next row
          pixels[i] = V::silu(V::load(from + wide * t + i * lanes) * scale + shift);
        }
      } else {
        float last[4 * lanes] = {};
        std::copy_n(from + wide * t, std::max<int64_t>(left, 0), last);
        for (int64_t i = 0; i < 4; i++) V::store(last + i * lanes, V::silu(V::load(last + i * lanes) * scale + shift));
        std::fill(last + std::max<int64_t>(left, 0), last + 4 * lanes, 0.f);
        for (int64_t i = 0; i < 4; i++) pixels[i] = V::load(last + i * lanes);
      }
      V::to_phases(pixels, four);
      for (int64_t i = 0; i < 4; i++) V::store(phases + i * phase + t, four[i]);
    }
    for (int64_t t = 0; t < padded; t += lanes) {  // what is written beyond the row, the next row overwrites
      Floats six[6], to_six[6];
      six[0] = V::load(phases + 3 * phase + t - 1);
      for (int64_t i = 0; i < 4; i++) six[i + 1] = V::load(phases + i * phase + t);
      six[5] = V::load(phases + t + 1);
      sums_of_input(six, to_six);
      for (int64_t i = 0; i < 6; i++) V::store(sums_of_row + i * parity + t, to_six[i]);
    }
  }
  const int64_t step = conv.channels * column<lanes>;
  for (int64_t t = 0; t < strip.tiles(); t += lanes) {
    float* at = to + (t / column<lanes> * sums * conv.channels + channel) * column<lanes> + t % column<lanes>;
    for (int64_t i = 0; i < 6; i++, at += 4 * step) {
      const float *even = half[0] + i * parity + t, *odd = half[1] + i * parity + t;
      const Floats four[4] = {V::load(even), V::load(odd), V::load(even + across), V::load(odd + across)};
      Floats to_four[4];
      sums_of_input(four, to_four);
      for (int64_t j = 0; j < 4; j++) V::store(at + j * step, to_four[j]);
    }
  }
}

// The sums of a few outputs' weights: [sums, channels, outputs_at_once].
template <int lanes>
INLINE void transform_weight(const SiluConv& conv, int64_t output, float* to) {
  using V = Vector<lanes>;
  using Floats = typename V::Floats;
  const int64_t count = std::min(outputs_at_once, conv.outputs - output), taps = conv.channels * 9;
  constexpr int64_t group = 16;  // channels
  alignas(64) float turned[group * 9][outputs_at_once] = {};
  for (int64_t first = 0; first < conv.channels; first += group) {
    const int64_t size = 9 * std::min(group, conv.channels - first);
    const float* const from = conv.weight + output * taps + first * 9;
    for (int64_t o = 0; o < count; o += 4) {
      for (int64_t k = 0; k < size; k += 4) {
        if (o + 4 <= count && k + 4 <= size) {
          float block[4][4];
          for (int64_t r = 0; r < 4; r++) {
            for (int64_t c = 0; c < 4; c++) block[c][r] = from[(o + r) * taps + k + c];
          }
          for (int64_t c = 0; c < 4; c++) std::memcpy(turned[k + c] + o, block[c], sizeof block[c]);
        } else {
          for (int64_t r = o; r < std::min(o + 4, count); r++) {
            for (int64_t c = k; c < std::min(k + 4, size); c++) turned[c][r] = from[r * taps + c];
          }
        }
      }
    }
    for (int64_t c = 0; c < size / 9; c++) {
      for (int64_t o = 0; o < outputs_at_once; o += lanes) {
        Floats rows[3][6];
        for (int64_t j = 0; j < 3; j++) {
          Floats taps_of_row[3];
          for (int64_t i = 0; i < 3; i++) taps_of_row[i] = V::load(turned[c * 9 + j * 3 + i] + o);
          sums_of_weight(taps_of_row, rows[j]);
        }
        for (int64_t i = 0; i < 6; i++) {
          const Floats three[3] = {rows[0][i], rows[1][i], rows[2][i]};
          Floats four[4];
          sums_of_weight(three, four);
          for (int64_t j = 0; j < 4; j++) {
            V::store(to + ((i * 4 + j) * conv.channels + first + c) * outputs_at_once + o, four[j]);
          }
        }
      }
    }
  }
}

// products[r, t] (+)= sum over channels of weight[c, r] * input[c, t], for a panel of rows and `vectors` of tiles
template <int lanes, int rows, int vectors>
INLINE void multiply(const float* weight, const float* input, int64_t channels, float* products, bool more) {
  using V = Vector<lanes>;
  using Floats = typename V::Floats;
  Floats total[rows][vectors] = {};
  for (int64_t c = 0; c < channels; c++) {
    __builtin_prefetch(weight + (c + soon) * outputs_at_once);
    Floats tiles[vectors];
    for (int v = 0; v < vectors; v++) __builtin_prefetch(input + (c + soon) * column<lanes> + v * lanes);
    for (int v = 0; v < vectors; v++) tiles[v] = V::load(input + c * column<lanes> + v * lanes);
    for (int r = 0; r < rows; r++) {
      for (int v = 0; v < vectors; v++) total[r][v] += weight[c * outputs_at_once + r] * tiles[v];
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < vectors; v++) {
      float* const at = products + r * column<lanes> + v * lanes;
      V::store(at, more ? V::load(at) + total[r][v] : total[r][v]);
    }
  }
}

// Calls row(place in y, pixels, row of the tile, tile - begin) for what each row of pixels has of some tiles.
template <class Row>
INLINE void for_rows(const SiluConv& conv, const Strip& strip, int64_t output, int64_t begin, int64_t end,
                     const Row& row) {
  const int64_t plane = (strip.image * conv.outputs + output) * conv.height * conv.width;
  for (int64_t tile = begin; tile < end;) {
    const int64_t x = tile % strip.across, y = (strip.first + tile / strip.across) * tall;
    const int64_t count = std::min(end - tile, strip.across - x);
    const int64_t size = std::min(count * wide, conv.width - x * wide);
    for (int64_t j = 0; j < std::min(tall, conv.height - y); j++) {
      row(plane + (y + j) * conv.width + x * wide, size, j, tile - begin);
    }
    tile += count;
  }
}

// One vector of tiles of one output: [sums] `stride` apart.
template <int lanes>
INLINE void write(const SiluConv& conv, const Strip& strip, int64_t output, int64_t tile, const float* products,
                  int64_t stride) {
  using V = Vector<lanes>;
  using Floats = typename V::Floats;
  Floats down[2][6];
  for (int64_t i = 0; i < 6; i++) {
    Floats four[4], two[2];
    for (int64_t j = 0; j < 4; j++) four[j] = V::load(products + (i * 4 + j) * stride);
    output_of_sums(four, two);
    for (int64_t j = 0; j < 2; j++) down[j][i] = two[j];
  }
  float pixels[2][wide * lanes];
  for (int64_t j = 0; j < 2; j++) {
    Floats phases[4];
    output_of_sums(down[j], phases);
    V::store_phases(pixels[j], phases);
  }
  const float bias = conv.bias ? conv.bias[output] : 0;
  for_rows(conv, strip, output, tile, std::min<int64_t>(tile + lanes, strip.tiles()),
           [&](int64_t at, int64_t size, int64_t j, int64_t t) __attribute__((always_inline)) {
             const float* const from = pixels[j] + t * wide;
             for (int64_t i = 0; i < size; i += lanes) {
               if (i + lanes > size) {
                 for (; i < size; i++) conv.y[at + i] = from[i] + (conv.residual ? conv.residual[at + i] + bias : bias);
               } else if (conv.residual) {
                 V::store(conv.y + at + i, V::load(from + i) + (V::load(conv.residual + at + i) + bias));
               } else {
                 V::store(conv.y + at + i, V::load(from + i) + bias);
               }
             }
           });
}

// A few outputs of some tiles.
template <int lanes, int rows>
INLINE void transform_output(const SiluConv& conv, const Strip& strip, const float* input, int64_t output,
                             int64_t begin, int64_t end) {
  const int64_t channels = conv.channels, count = std::min(outputs_at_once, conv.outputs - output);
  const Scratch scratch(sums * outputs_at_once * (channels + column<lanes>));
  float* const weight = scratch.floats;
  float* const products = weight + sums * outputs_at_once * channels;  // [sums, outputs_at_once, column]
  transform_weight<lanes>(conv, output, weight);
  for (int64_t tile = begin; tile < end; tile += column<lanes>) {
    const int64_t vectors = std::min<int64_t>(3, divide_up(end - tile, lanes));
    for (int64_t s = 0; s < sums; s++) {
      for (int64_t c = 0; c < channels; c += piece) {
        const int64_t depth = std::min(piece, channels - c);
        const float* const tiles = input + ((tile / column<lanes> * sums + s) * channels + c) * column<lanes>;
        for (int64_t r = 0; r < count; r += rows) {
          const float* const of = weight + (s * channels + c) * outputs_at_once + r;
          float* const to = products + (s * outputs_at_once + r) * column<lanes>;
          if (vectors == 3) multiply<lanes, rows, 3>(of, tiles, depth, to, c > 0);
          if (vectors == 2) multiply<lanes, rows, 2>(of, tiles, depth, to, c > 0);
          if (vectors == 1) multiply<lanes, rows, 1>(of, tiles, depth, to, c > 0);
        }
      }
    }
    for (int64_t r = 0; r < count; r++) {
      for (int64_t v = 0; v < vectors; v++) {
        write<lanes>(conv, strip, output + r, tile + v * lanes, products + r * column<lanes> + v * lanes,
                     outputs_at_once * column<lanes>);
      }
    }
  }
}

struct Kernels {
  const char* name;
  int64_t column;
  void (*input)(const SiluConv& conv, const Strip& strip, int64_t channel, float* to);
  void (*output)(const SiluConv& conv, const Strip& strip, const float* input, int64_t output, int64_t begin,
                 int64_t end);
};

#ifdef __x86_64__
[[gnu::target("avx512f")]] void input_avx512(const SiluConv& conv, const Strip& strip, int64_t channel, float* to) {
  transform_input<16>(conv, strip, channel, to);
}
[[gnu::target("avx512f")]] void output_avx512(const SiluConv& conv, const Strip& strip, const float* input,
                                              int64_t output, int64_t begin, int64_t end) {
  transform_output<16, 8>(conv, strip, input, output, begin, end);
}
[[gnu::target("avx2,fma")]] void input_avx2(const SiluConv& conv, const Strip& strip, int64_t channel, float* to) {
  transform_input<8>(conv, strip, channel, to);
}
[[gnu::target("avx2,fma")]] void output_avx2(const SiluConv& conv, const Strip& strip, const float* input,
                                             int64_t output, int64_t begin, int64_t end) {
  transform_output<8, 4>(conv, strip, input, output, begin, end);
}
#endif
void input_scalar(const SiluConv& conv, const Strip& strip, int64_t channel, float* to) {
  transform_input<4>(conv, strip, channel, to);
}
void output_scalar(const SiluConv& conv, const Strip& strip, const float* input, int64_t output, int64_t begin,
                   int64_t end) {
  transform_output<4, 4>(conv, strip, input, output, begin, end);
}
#undef INLINE

const Kernels& chosen() {
  static const Kernels all[] = {
#ifdef __x86_64__
      {"avx512", column<16>, input_avx512, output_avx512},
      {"avx2", column<8>, input_avx2, output_avx2},
#endif
      {"scalar", column<4>, input_scalar, output_scalar},
  };
  static const Kernels& chosen = *std::find_if(
      std::begin(all), std::end(all) - 1, [](const Kernels& set) { return !std::strcmp(set.name, instruction_set()); });
  return chosen;
}

// Rows of tiles at a time: their sums stay in the last-level cache, and are enough to make up for the weight's.
int64_t rows_of_a_strip(const SiluConv& conv) {
  const int64_t rows = divide_up(conv.height, tall), across = divide_up(conv.width, wide);
  const int64_t tiles = std::max<int64_t>(strip_tiles, strip_bytes / (sums * conv.channels * sizeof(float)));
  const int64_t strips = divide_up(rows, std::max<int64_t>(1, tiles / across));
  return divide_up(rows, strips);
}

// What one thread does of a strip at a time is a channel of the input, then a few outputs of some tiles.
void convolve(const SiluConv& conv, const Strip& strip, const ParallelFor& parallel_for) {
  const int64_t columns = divide_up(strip.tiles(), chosen().column);
  const Scratch scratch(columns * chosen().column * sums * conv.channels);
  float* const input = scratch.floats;
  parallel_for(conv.channels, [&](int64_t channel) { chosen().input(conv, strip, channel, input); });
  const int64_t ranges = divide_up(columns, columns_at_once), range = columns_at_once * chosen().column;
  parallel_for(divide_up(conv.outputs, outputs_at_once) * ranges, [&](int64_t task) {
    const int64_t begin = task % ranges * range, end = std::min(begin + range, strip.tiles());
    chosen().output(conv, strip, input, task / ranges * outputs_at_once, begin, end);
  });
}

void one_by_one(int64_t tasks, const std::function<void(int64_t task)>& task) {
  for (int64_t k = 0; k < tasks; k++) task(k);
}

}  // namespace

void silu_conv(const SiluConv& conv, const ParallelFor& parallel_for) {
  const int64_t all_rows = divide_up(conv.height, tall), rows = rows_of_a_strip(conv);
  const int64_t strips = divide_up(all_rows, rows);
  const auto convolve_strip = [&](int64_t k, const ParallelFor& inside) {
    const int64_t first = k % strips * rows;
    convolve(conv, {k / strips, first, std::min(rows, all_rows - first), divide_up(conv.width, wide)}, inside);
  };
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  if (conv.images * strips >= 4 * cores) {  // enough for all: nobody waits for anybody
    parallel_for(conv.images * strips, [&](int64_t k) { convolve_strip(k, one_by_one); });
  } else {
    for (int64_t k = 0; k < conv.images * strips; k++) convolve_strip(k, parallel_for);
  }
}

}  // namespace tilewright
