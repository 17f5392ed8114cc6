// An NVIDIA GPU through its driver: memory, copies and a stream. No library of CUDA is linked. As runtime/engines/driver.py.
#pragma once

#include <array>
#include <mutex>
#include <optional>

#include "base.hpp"

namespace tw {

// The least compute capability of the GPUs; none without a GPU.
std::optional<std::array<std::int64_t, 2>> compute_capability();
std::optional<std::int64_t> gpu_available_bytes();  // of the first GPU

// The first GPU with one stream, for one thread at a time: a `Use` waits for it, and makes it current. Its functions need one.
class Gpu {
   public:
    static Gpu& first();  // throws Error(environment) without a GPU

    class Use {
       public:
        explicit Use(Gpu& gpu);

       private:
        std::lock_guard<std::recursive_mutex> guard_;
    };

    void* stream() const { return stream_; }
    void fill(void* to, const void* from, std::size_t bytes);  // `from` must stay as it is until `wait`
    void read(void* to, const void* from, std::size_t bytes);  // complete after `wait`
    void wait();
    // Memory for the values inside of calls, at least so large; all engines use it in turn. A larger size moves it.
    void* scratch(std::size_t bytes);

    // Memory of the GPU.
    class Block {
       public:
        Block(Gpu& gpu, std::size_t bytes);
        ~Block();
        Block(const Block&) = delete;
        Block& operator=(const Block&) = delete;

        void* address() const { return address_; }
        std::size_t bytes() const { return bytes_; }

       private:
        Gpu& gpu_;
        void* address_ = nullptr;
        std::size_t bytes_;
    };

   private:
    Gpu();

    std::recursive_mutex lock_;
    void *context_ = nullptr, *stream_ = nullptr;
    std::optional<Block> scratch_;
};

}  // namespace tw
