#include "digests.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>

#include "base.hpp"
#include "json.hpp"

namespace tw {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t BLOCK = 1 << 20;

// Values that differ between two files, and change when a file changes, as JSON.
std::string identity_of(const fs::path& path) {
    struct stat facts {};
    std::error_code error;
    fs::path real = fs::canonical(path, error);
    if (error || ::stat(path.c_str(), &facts) != 0) return "";
    auto nanoseconds = [](const timespec& time) { return std::to_string(std::int64_t{time.tv_sec} * 1000000000 + time.tv_nsec); };
    Json name;
    name.kind = Json::string;
    name.text = real.string();
    return "[" + name.dump() + ", " + std::to_string(facts.st_size) + ", " + nanoseconds(facts.st_mtim) + ", " + nanoseconds(facts.st_ctim) + ", " +
           std::to_string(facts.st_ino) + "]";
}

std::optional<fs::path> note_of(const std::string& identity) {
    auto folder = cache_dir();
    if (!folder || identity.empty()) return std::nullopt;
    return *folder / "digests" / sha256(identity.data(), identity.size());
}

std::string remembered(const fs::path& note) {
    std::ifstream file(note, std::ios::binary);
    std::string digest(65, ' ');
    file.read(digest.data(), 65);
    bool right = file.gcount() == 64 && digest.find_first_not_of("0123456789abcdef") == 64;
    return right ? digest.substr(0, 64) : "";
}

// What cannot be remembered is computed again the next time.
void remember(const fs::path& note, const std::string& digest) {
    std::error_code error;
    fs::create_directories(note.parent_path(), error);
    fs::path temporary = note.parent_path() / ("." + std::to_string(std::random_device()()) + "." + std::to_string(::getpid()) + ".part");
    bool written = false;
    {
        std::ofstream file(temporary, std::ios::binary);
        file << digest;
        file.close();
        written = file.good();
    }
    if (written) fs::rename(temporary, note, error);
    if (!written || error) fs::remove(temporary, error);
}

std::string read_digest(const fs::path& path) {
    int file = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);  // the flag keeps a pipe from waiting
    struct stat facts {};
    std::string reason = file < 0 ? std::strerror(errno) : ::fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode) ? "is no regular file" : "";
    Sha256 digest;
    auto block = std::make_unique<char[]>(BLOCK);
    while (reason.empty()) {
        ssize_t size = ::read(file, block.get(), BLOCK);
        if (size == 0) break;
        if (size > 0) digest.update(block.get(), static_cast<std::size_t>(size));
        if (size < 0 && errno != EINTR) reason = std::strerror(errno);
    }
    if (file >= 0) ::close(file);
    if (!reason.empty()) throw Error(damaged, path.string() + ": " + reason + "; rebuild the bundle");
    return digest.hex();
}

}  // namespace

std::optional<fs::path> cache_dir() {
    auto folder = [](const char* name) {
        const char* value = std::getenv(name);
        return value && *value ? std::optional<fs::path>(value) : std::nullopt;
    };
    if (auto chosen = folder("TILEWRIGHT_CACHE_DIR")) return chosen;
    if (auto cache = folder("XDG_CACHE_HOME")) return *cache / "tilewright";
    if (auto home = folder("HOME")) return *home / ".cache" / "tilewright";
    return std::nullopt;
}

std::string sha256_of_file(const fs::path& path, bool fresh) {
    const std::string identity = identity_of(path);
    auto note = note_of(identity);
    if (note && !fresh)
        if (std::string digest = remembered(*note); !digest.empty()) return digest;
    std::string digest = read_digest(path);
    if (note && identity_of(path) == identity) remember(*note, digest);  // a file that changed while it was read is not remembered
    return digest;
}

}  // namespace tw
