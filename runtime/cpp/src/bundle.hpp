// Reading a bundle and checking all of it, but for what only a run can show. As runtime/bundle/read.py.
#pragma once

#include <filesystem>
#include <memory>

#include "digests.hpp"
#include "documents.hpp"

namespace tw {

using Path = std::filesystem::path;

// A file mapped into memory, read only.
class Mapped {
   public:
    explicit Mapped(const Path& path);  // throws Error(damaged)
    ~Mapped();
    Mapped(const Mapped&) = delete;
    Mapped& operator=(const Mapped&) = delete;

    const unsigned char* data() const { return data_; }
    std::size_t size() const { return size_; }

   private:
    const unsigned char* data_ = nullptr;
    std::size_t size_ = 0;
};

struct Stored {
    TensorSpec spec;
    std::int64_t start, length;
};

// The tensors of a safetensors file, from its header. `size` is that of the whole file.
Named<Stored> safetensors_header(const unsigned char* data, std::size_t size, const std::string& where);

// The place of an initializer's bytes, as written in a graph.
struct External {
    std::string location, dtype;
    std::int64_t offset, length;
    Shape shape;
};

Named<External> external_data(const std::string& graph, const std::string& where);
// The graph with other locations for the bytes of these initializers.
std::string relocated(const std::string& graph, const Named<std::string>& locations, const std::string& where);
// The graph with an input in the place of every initializer whose bytes are in another file.
std::string with_inputs(const std::string& graph, const std::string& where);

std::string bytes_of(const Path& path);

struct Bundle {
    Path root;
    Manifest manifest;
    Program program;
    Weights weights;
    std::string digest;
    Named<Stored> constants;
    bool fresh = false;  // digests of weights are computed, not remembered

    // Location in the graphs that read a table of weights -> the present path of the file, checked.
    Named<Path> files_of(const std::string& table, const std::optional<Path>& weights_dir) const;

   private:
    Path folder(const std::string& name, const std::optional<Path>& weights_dir) const;
};

// `fresh`: also reads files with a remembered digest.
Bundle read_bundle(const Path& root, const std::optional<std::string>& expect, bool fresh = false);

}  // namespace tw
