// A 3x3 convolution of SiLU(x * scale + shift), padded with zeros by one, plus bias and residual: pointers in, pixels
// out, nothing of ONNX Runtime.
//
// Winograd's algorithm on tiles of 2 rows by 4 columns multiplies a third as often as the convolution as it is written,
// and rounds two to three times as much. NaN and infinity spread over the tiles that see them: at most 2 rows and 4
// columns away. The instruction set is codebook.h's.
#pragma once

#include <cstdint>
#include <functional>

namespace tilewright {

struct SiluConv {
  int64_t images, channels, outputs, height, width;
  const float* x;         // [images, channels, height, width]
  const float* scale;     // [images, channels]
  const float* shift;     // [images, channels]
  const float* weight;    // [outputs, channels, 3, 3]
  const float* bias;      // [outputs], or null for zeros
  const float* residual;  // [images, outputs, height, width], or null for zeros
  float* y;               // [images, outputs, height, width]
};

// Calls its second argument with 0, 1, ... up to its first, in any order and on any threads, and waits for all.
using ParallelFor = std::function<void(int64_t tasks, const std::function<void(int64_t task)>& task)>;

// The result does not depend on how the work is shared out.
void silu_conv(const SiluConv& conv, const ParallelFor& parallel_for);

}  // namespace tilewright
