#include "machine.hpp"

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

}  // namespace tw
