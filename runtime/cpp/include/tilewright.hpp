// tilewright.h for C++17: a bundle and an image that free themselves, and errors as exceptions.
#pragma once

#include <tilewright.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace tilewright {

struct Error : std::runtime_error {
    int status;  // TW_USAGE, ...
    Error(int code, const char* message) : std::runtime_error(message), status(code) {}
};

// Pixels that the library allocated.
class Image {
   public:
    Image() = default;
    ~Image() { tw_image_free(&image_); }
    Image(Image&& other) noexcept : image_(std::exchange(other.image_, tw_image{})) {}
    Image& operator=(Image&& other) noexcept {
        std::swap(image_, other.image_);
        return *this;
    }
    const tw_image* operator->() const { return &image_; }
    tw_image* get() { return &image_; }

   private:
    tw_image image_{};
};

class Bundle {
   public:
    explicit Bundle(const std::string& path, const tw_params& params = tw_default_params()) : bundle_(tw_open(path.c_str(), &params)) {
        if (!bundle_) throw Error(tw_last_status(), tw_last_error(nullptr));
    }
    ~Bundle() { tw_close(bundle_); }
    Bundle(Bundle&& other) noexcept : bundle_(std::exchange(other.bundle_, nullptr)) {}
    Bundle& operator=(Bundle&& other) noexcept {
        std::swap(bundle_, other.bundle_);
        return *this;
    }

    Image restore(const tw_image& in, const tw_options& options = tw_default_options()) const {
        Image out;
        check(tw_restore(bundle_, &in, &options, out.get()));
        return out;
    }
    void check(int status) const {
        if (status) throw Error(status, tw_last_error(bundle_));
    }
    std::string system() const { return tw_system(bundle_); }
    std::string digest() const { return tw_digest(bundle_); }
    std::string devices() const { return tw_devices(bundle_); }
    tw_bundle* get() const { return bundle_; }

   private:
    tw_bundle* bundle_;
};

}  // namespace tilewright
