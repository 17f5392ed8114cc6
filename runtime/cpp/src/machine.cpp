#include "machine.hpp"

#include <dlfcn.h>
#include <sched.h>
#include <sys/utsname.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <thread>

namespace tw {
namespace {

std::string trimmed(const std::string& text) {
    std::size_t first = text.find_first_not_of(" \t"), last = text.find_last_not_of(" \t\r");
    return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

// What the kernel says of the first core.
std::map<std::string, std::string> cpu_facts() {
    std::map<std::string, std::string> facts;
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line) && !(line.empty() && !facts.empty());)
        if (std::size_t colon = line.find(':'); colon != std::string::npos) facts[trimmed(line.substr(0, colon))] = trimmed(line.substr(colon + 1));
    return facts;
}

// The number after a name in a file whose lines are like "name 5" or "name: 5 kB".
std::int64_t number_after(const std::string& path, const std::string& name) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string first;
        std::int64_t number = 0;
        if (words >> first >> number && (first == name || first == name + ":")) return number;
    }
    return -1;
}

// A function of a library, by its name.
template <typename Function>
Function* function_of(void* library, const char* name) {
    return reinterpret_cast<Function*>(::dlsym(library, name));
}

// NVIDIA's driver, or null. Once loaded, it stays.
void* gpu_driver() { return ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL); }

constexpr int MAJOR = 75, MINOR = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*

}  // namespace

std::int64_t usable_cores() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    return std::max(1U, std::thread::hardware_concurrency());
}

std::string processor() {
    auto facts = cpu_facts();
    utsname system{};
    std::string text = facts.count("model name") ? facts["model name"] : uname(&system) == 0 ? system.machine : "";
    for (const char* key : {"cpu family", "model", "stepping", "CPU implementer", "CPU part"})
        if (facts.count(key)) text += ", " + std::string(std::string(key).rfind("cpu ", 0) == 0 ? key + 4 : key) + " " + facts[key];
    return text;
}

std::set<std::string> instructions() {
    auto facts = cpu_facts();
    std::istringstream words(facts.count("flags") ? facts["flags"] : facts["Features"]);  // x86, Arm
    std::set<std::string> names;
    for (std::string word; words >> word;) names.insert(word);
    return names;
}

std::optional<std::int64_t> available_bytes() {
    std::int64_t free = number_after("/proc/meminfo", "MemAvailable");
    if (free < 0) return std::nullopt;
    free *= 1024;
    const std::string group = "/sys/fs/cgroup/memory.";
    std::ifstream limits(group + "max"), usage(group + "current");
    std::int64_t limit = 0, used = 0;
    if (limits >> limit && usage >> used) {  // no number: no limit
        std::int64_t cached = 0;             // the system frees it when needed
        for (const char* name : {"active_file", "inactive_file"}) cached += std::max<std::int64_t>(0, number_after(group + "stat", name));
        free = std::min(free, limit - used + cached);
    }
    return free;
}

std::optional<std::array<std::int64_t, 2>> compute_capability() {
    void* driver = gpu_driver();
    if (!driver) return std::nullopt;
    auto* begin = function_of<int(unsigned)>(driver, "cuInit");
    auto* count_of = function_of<int(int*)>(driver, "cuDeviceGetCount");
    auto* device_of = function_of<int(int*, int)>(driver, "cuDeviceGet");
    auto* attribute_of = function_of<int(int*, int, int)>(driver, "cuDeviceGetAttribute");
    int count = 0;
    if (!begin || !count_of || !device_of || !attribute_of || begin(0) || count_of(&count)) return std::nullopt;
    std::optional<std::array<std::int64_t, 2>> least;
    for (int number = 0; number < count; ++number) {
        int device = 0, major = 0, minor = 0;
        if (device_of(&device, number) || attribute_of(&major, MAJOR, device) || attribute_of(&minor, MINOR, device)) continue;
        std::array<std::int64_t, 2> its{major, minor};
        if (!least || its < *least) least = its;
    }
    return least;
}

std::optional<std::int64_t> gpu_available_bytes() {
    void* driver = gpu_driver();
    if (!driver) return std::nullopt;
    auto* begin = function_of<int(unsigned)>(driver, "cuInit");
    auto* device_of = function_of<int(int*, int)>(driver, "cuDeviceGet");
    auto* context_of = function_of<int(void**, int)>(driver, "cuDevicePrimaryCtxRetain");  // the one that ONNX Runtime uses
    auto* use = function_of<int(void*)>(driver, "cuCtxSetCurrent");
    auto* memory_of = function_of<int(std::size_t*, std::size_t*)>(driver, "cuMemGetInfo_v2");
    int device = 0;
    void* context = nullptr;
    std::size_t free = 0, total = 0;
    if (!begin || !device_of || !context_of || !use || !memory_of) return std::nullopt;
    if (begin(0) || device_of(&device, 0) || context_of(&context, device) || use(context) || memory_of(&free, &total)) return std::nullopt;
    return static_cast<std::int64_t>(free);
}

}  // namespace tw
