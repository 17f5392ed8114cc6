// A packaged network without Python: main PACKAGE INPUT OUTPUT BATCH TOKENS WIDTH. Files are raw float32; the network
// takes one tensor of these sizes, and what it gives is written one after the other.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <fstream>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  c10::InferenceMode inference;
  at::set_num_threads(1);
  std::vector<int64_t> sizes;
  for (int i = 4; i < 7; ++i) sizes.push_back(std::atoll(argv[i]));
  const at::Tensor input = at::from_file(argv[2], false, sizes[0] * sizes[1] * sizes[2], at::kFloat).view(sizes);
  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  std::ofstream output(argv[3], std::ios::binary);
  for (const at::Tensor& result : package.run({input})) {
    const at::Tensor written = result.to(at::kFloat).contiguous();
    output.write(static_cast<const char*>(written.const_data_ptr()), written.nbytes());
  }
  return output ? 0 : 1;
}
