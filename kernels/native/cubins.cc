#include "cubins.h"

#include <dlfcn.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>

namespace tilewright {

namespace {

constexpr const char* header = "tilewright cubins 1";
constexpr unsigned shared_without_asking = 48 * 1024;  // bytes a block may take before it must be allowed more

std::filesystem::path folder_of_cubins() {
  if (const char* given = std::getenv("TILEWRIGHT_CUBINS")) return given;
  Dl_info library{};
  if (!dladdr(reinterpret_cast<void*>(&folder_of_cubins), &library)) throw Error("tilewright: set TILEWRIGHT_CUBINS");
  return std::filesystem::path(library.dli_fname).parent_path() / "cubins";
}

template <typename Function>
void open(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw Error(std::string("tilewright: NVIDIA's driver is too old: it has no ") + name);
}

}  // namespace

Driver::Driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (!library) throw Error("tilewright: no libcuda.so.1: CUDA kernels need NVIDIA's driver");
#define TILEWRIGHT_TEXT(name) #name
#define TILEWRIGHT_OPEN(name) open(library, TILEWRIGHT_TEXT(name), this->name)
  TILEWRIGHT_OPEN(cuGetErrorName);
  TILEWRIGHT_OPEN(cuStreamGetCtx);
  TILEWRIGHT_OPEN(cuCtxPushCurrent);
  TILEWRIGHT_OPEN(cuCtxPopCurrent);
  TILEWRIGHT_OPEN(cuCtxGetDevice);
  TILEWRIGHT_OPEN(cuDeviceGetAttribute);
  TILEWRIGHT_OPEN(cuModuleLoadData);
  TILEWRIGHT_OPEN(cuModuleGetFunction);
  TILEWRIGHT_OPEN(cuFuncSetAttribute);
  TILEWRIGHT_OPEN(cuLaunchKernel);
#undef TILEWRIGHT_OPEN
#undef TILEWRIGHT_TEXT
}

void Driver::check(CUresult result, const std::string& what) const {
  if (result == CUDA_SUCCESS) return;
  const char* name = nullptr;
  cuGetErrorName(result, &name);
  throw Error("tilewright: " + what + ": " + (name ? name : "error " + std::to_string(result)));
}

Cubin::Cubin(const std::string& facts) {
  std::istringstream words(facts);
  for (std::string word; words >> word;) {
    const auto equals = word.find('=');
    if (equals != std::string::npos) words_[word.substr(0, equals)] = word.substr(equals + 1);
  }
  kernel = words_["kernel"], file = words_["file"], parameters = words_["parameters"];
  threads = static_cast<unsigned>(block("threads"));
  shared = static_cast<unsigned>(block("shared"));
  scratch = static_cast<size_t>(block("scratch"));
  if (kernel.empty() || file.empty() || parameters.empty()) throw Error("kernel, file or parameters are missing");
}

int64_t Cubin::block(const std::string& name) const {
  const auto found = words_.find(name);
  if (found == words_.end()) throw Error(name + " is missing");
  try {
    size_t read = 0;
    const int64_t value = std::stoll(found->second, &read);
    if (read == found->second.size() && value >= 0) return value;
  } catch (const std::logic_error&) {  // no number, or a huge one
  }
  throw Error(name + "=" + found->second + " is not a size");
}

OnDevice::OnDevice(const Driver& driver, CUstream stream) : driver_(driver) {
  driver.check(driver.cuStreamGetCtx(stream, &context_), "cuStreamGetCtx");
  driver.check(driver.cuCtxPushCurrent(context_), "cuCtxPushCurrent");
}

OnDevice::~OnDevice() {
  CUcontext popped = nullptr;
  driver_.cuCtxPopCurrent(&popped);
}

int OnDevice::arch() const {
  CUdevice device = 0;
  int major = 0, minor = 0;
  driver_.check(driver_.cuCtxGetDevice(&device), "cuCtxGetDevice");
  driver_.check(driver_.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device), "major");
  driver_.check(driver_.cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device), "minor");
  return 10 * major + minor;
}

Cubins& Cubins::here() {
  static Cubins cubins(folder_of_cubins());
  return cubins;
}

Cubins::Cubins(std::filesystem::path folder) : folder_(std::move(folder)) {
  const std::string path = (folder_ / "manifest.txt").string();
  std::ifstream manifest(path);
  if (!manifest) {
    throw Error("tilewright: no cubins: " + path + " is not there; python -m tilewright.kernels.cubins -o " +
                folder_.string() + " makes it, TILEWRIGHT_CUBINS says where it is");
  }
  std::string line;
  std::getline(manifest, line);
  if (line != header) throw Error("tilewright: " + path + " does not begin with '" + header + "': make it again");
  for (size_t number = 2; std::getline(manifest, line); ++number) {
    const auto end = line.find(" kernel=");
    try {
      if (end == std::string::npos) throw Error("kernel is missing");
      cubins_.emplace(line.substr(0, end), Cubin(line.substr(end)));
    } catch (const Error& error) {
      throw Error("tilewright: " + path + ":" + std::to_string(number) + ": " + error.what() + ": make it again");
    }
  }
}

const Cubin& Cubins::find(const std::string& words) const {
  const auto found = cubins_.find(words);
  if (found == cubins_.end()) {
    throw Error("tilewright: no cubin for these sizes; make it with: python -m tilewright.kernels.cubins -o " +
                folder_.string() + " '" + words + "'");
  }
  return found->second;
}

CUfunction Cubins::function(const Cubin& cubin, CUcontext context) {
  const std::lock_guard<std::mutex> lock(loading_);
  CUfunction& function = loaded_[{&cubin, context}];
  if (function) return function;
  const auto path = folder_ / cubin.file;
  std::ifstream file(path, std::ios::binary);
  const std::string image{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (image.empty()) throw Error("tilewright: cannot read " + path.string() + ", which the manifest names");
  CUmodule module = nullptr;
  CUfunction found = nullptr;
  driver_.check(driver_.cuModuleLoadData(&module, image.data()), "loading " + path.string());
  driver_.check(driver_.cuModuleGetFunction(&found, module, cubin.kernel.c_str()),
                cubin.kernel + " in " + path.string());
  if (cubin.shared > shared_without_asking) {
    driver_.check(driver_.cuFuncSetAttribute(found, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                             static_cast<int>(cubin.shared)),
                  std::to_string(cubin.shared) + " bytes of shared memory for " + cubin.kernel);
  }
  return function = found;
}

void Cubins::launch(const Cubin& cubin, const OnDevice& device, CUstream stream, const std::array<int64_t, 3>& grid,
                    const std::vector<const void*>& inputs, const std::vector<int32_t>& sizes,
                    const std::vector<void*>& outputs) {
  const std::string given =
      std::string(inputs.size(), 'p') + std::string(sizes.size(), 'i') + std::string(outputs.size(), 'p');
  if (given != cubin.parameters) {
    throw Error("tilewright: " + cubin.kernel + " takes " + cubin.parameters + ", this library gives " + given +
                ": make the cubins with the version that the library is of");
  }
  const void* scratch = nullptr;
  std::vector<void*> parameters;  // the driver reads what they point to, and takes no const
  for (const void* const& input : inputs) parameters.push_back(const_cast<const void**>(&input));
  for (const int32_t& size : sizes) parameters.push_back(const_cast<int32_t*>(&size));
  for (void* const& output : outputs) parameters.push_back(const_cast<void**>(&output));
  parameters.insert(parameters.end(), cubin.scratch, &scratch);
  const auto axis = [&](size_t i) { return static_cast<unsigned>(grid[i]); };
  const CUfunction loaded = function(cubin, device.context());
  driver_.check(driver_.cuLaunchKernel(loaded, axis(0), axis(1), axis(2), cubin.threads, 1, 1, cubin.shared, stream,
                                       parameters.data(), nullptr),
                "launching " + cubin.kernel);
}

}  // namespace tilewright
