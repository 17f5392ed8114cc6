// The cubins of a folder: found by what they were compiled for, loaded once, launched through NVIDIA's driver.
//
// kernels/cubins.py writes the folder and says what a line of its manifest means. The driver is opened when the first
// kernel is needed, so that the library loads on a machine without one.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace tilewright {

// What a user reads: one line.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Driver {
  Driver();

#define TILEWRIGHT_DRIVER(name) decltype(&::name) name
  TILEWRIGHT_DRIVER(cuGetErrorName);
  TILEWRIGHT_DRIVER(cuStreamGetCtx);
  TILEWRIGHT_DRIVER(cuCtxPushCurrent);
  TILEWRIGHT_DRIVER(cuCtxPopCurrent);
  TILEWRIGHT_DRIVER(cuCtxGetDevice);
  TILEWRIGHT_DRIVER(cuDeviceGetAttribute);
  TILEWRIGHT_DRIVER(cuModuleLoadData);
  TILEWRIGHT_DRIVER(cuModuleGetFunction);
  TILEWRIGHT_DRIVER(cuFuncSetAttribute);
  TILEWRIGHT_DRIVER(cuLaunchKernel);
#undef TILEWRIGHT_DRIVER

  void check(CUresult result, const std::string& what) const;
};

// A line of the manifest: how a kernel is launched.
struct Cubin {
  explicit Cubin(const std::string& facts);

  int64_t block(const std::string& name) const;  // BLOCK_M, ...

  std::string kernel, file, parameters;  // parameters: p for a pointer, i for an int32
  unsigned threads, shared;
  size_t scratch;  // pointers after the parameters, never read

 private:
  std::map<std::string, std::string> words_;
};

// A stream's device, current in this thread while this object lives.
class OnDevice {
 public:
  OnDevice(const Driver& driver, CUstream stream);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  int arch() const;  // 80, 90, ...
  CUcontext context() const { return context_; }

 private:
  const Driver& driver_;
  CUcontext context_ = nullptr;
};

class Cubins {
 public:
  // Those of the folder TILEWRIGHT_CUBINS, or of `cubins` beside this library.
  static Cubins& here();

  const Driver& driver() const { return driver_; }

  // The one compiled for these words, up to `kernel=`.
  const Cubin& find(const std::string& words) const;

  void launch(const Cubin& cubin, const OnDevice& device, CUstream stream, const std::array<int64_t, 3>& grid,
              const std::vector<const void*>& inputs, const std::vector<int32_t>& sizes,
              const std::vector<void*>& outputs);

 private:
  explicit Cubins(std::filesystem::path folder);

  CUfunction function(const Cubin& cubin, CUcontext context);

  std::filesystem::path folder_;
  std::map<std::string, Cubin> cubins_;
  Driver driver_;
  std::mutex loading_;
  std::map<std::pair<const Cubin*, CUcontext>, CUfunction> loaded_;
};

}  // namespace tilewright
