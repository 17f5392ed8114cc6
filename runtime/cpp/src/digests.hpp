// SHA-256 of files. Digests are remembered by path, size, inode and times, so that gigabytes are read once; the Python runtime
// shares them. As runtime/bundle/digests.py.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace tw {

class Sha256 {
   public:
    Sha256();
    void update(const void* data, std::size_t size);
    std::string hex() const;  // of all that came so far

   private:
    std::array<std::uint32_t, 8> h_;
    std::array<unsigned char, 64> tail_{};
    std::uint64_t size_ = 0;
};

// The folder of digests, and of notes on machine code that was compiled here; none without a home.
std::optional<std::filesystem::path> cache_dir();
std::string sha256(const void* data, std::size_t size);
// `fresh`: reads the file even if its digest is remembered. Throws Error(damaged).
std::string sha256_of_file(const std::filesystem::path& path, bool fresh);

}  // namespace tw
