// One codeword of each group for each row: pointers in, indices and codewords out, nothing of ONNX Runtime.
//
// The greatest score wins, the lowest index among equals, and NaN only where all are NaN (then index 0).
// TILEWRIGHT_SIMD=avx512|avx2|scalar forces an instruction set; without it the best that this CPU has is taken.
#pragma once

#include <cstdint>

namespace tilewright {

struct Codebook {
  const float* codes;  // [groups, size, width]
  int64_t groups, size, width;
};

struct Choice {
  int32_t* indices;  // [rows, groups]
  float* codes;      // [rows, groups * width]
};

// What one thread does at a time. Neither the split into blocks nor their order changes a result.
struct Block {
  int64_t begin, end;  // rows
  int64_t group;
};

// The instruction set in use; throws std::invalid_argument where TILEWRIGHT_SIMD asks for another than this CPU has.
const char* instruction_set();

// Scores latents . code - |code|^2 / 2: the nearest codeword. latents [rows, groups * width].
void choose_nearest(const float* latents, const Codebook& codebook, const Choice& choice, const Block& block);

// Scores are given: logits [rows, groups * size].
void choose_from_logits(const float* logits, const Codebook& codebook, const Choice& choice, const Block& block);

// Scores hidden . weight + bias, never stored: hidden [rows, channels], weight [groups * size, channels],
// bias [groups * size] or null.
void choose_from_hidden(const float* hidden, int64_t channels, const float* weight, const float* bias,
                        const Codebook& codebook, const Choice& choice, const Block& block);

}  // namespace tilewright
