// A service that restores pictures: POST / takes a PNG file and answers with one. GET / tells what it runs.
//   service BUNDLE [PORT]; a port of 0 is any free one. It ends on SIGINT and SIGTERM; pictures in work are cancelled.
#include <httplib.h>
#include <png.h>
#include <tilewright.hpp>

#include <atomic>
#include <csignal>
#include <iostream>
#include <thread>

namespace {

std::atomic<int> stopping{0};

struct Bad : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::vector<std::uint8_t> decoded(const std::string& file, tw_image& image) {
    png_image png{};
    png.version = PNG_IMAGE_VERSION;
    if (!png_image_begin_read_from_memory(&png, file.data(), file.size())) throw Bad(std::string("no PNG: ") + png.message);
    png.format = png.format & PNG_FORMAT_FLAG_ALPHA ? PNG_FORMAT_RGBA : PNG_FORMAT_RGB;
    std::vector<std::uint8_t> pixels(PNG_IMAGE_SIZE(png));
    if (!png_image_finish_read(&png, nullptr, pixels.data(), 0, nullptr)) throw Bad(std::string("a damaged PNG: ") + png.message);
    bool alpha = png.format == PNG_FORMAT_RGBA;
    image = {static_cast<std::int32_t>(png.width), static_cast<std::int32_t>(png.height), alpha ? TW_RGBA8 : TW_RGB8, 0, pixels.data()};
    return pixels;
}

std::string encoded(const tw_image& image) {
    png_image png{};
    png.version = PNG_IMAGE_VERSION;
    png.width = static_cast<png_uint_32>(image.width), png.height = static_cast<png_uint_32>(image.height);
    png.format = image.format == TW_RGBA8 ? PNG_FORMAT_RGBA : PNG_FORMAT_RGB;
    png_alloc_size_t size = PNG_IMAGE_PNG_SIZE_MAX(png);
    std::string file(size, '\0');
    if (!png_image_write_to_memory(&png, file.data(), &size, 0, image.pixels, 0, nullptr)) throw std::runtime_error(png.message);
    file.resize(size);
    return file;
}

// The status of HTTP for one of the library.
int status_of(int status) {
    if (status == TW_USAGE || status == TW_INPUT) return 422;
    return status == TW_RESOURCE || status == TW_CANCELLED ? 503 : 500;
}

}  // namespace

int main(int count, char** words) try {
    if (count < 2 || count > 3) return std::cerr << "usage: service BUNDLE [PORT]\n", TW_USAGE;
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // in every thread; one waits for them

    tilewright::Bundle bundle(words[1]);
    tw_options options = tw_default_options();
    options.is_cancelled = [](void*) { return std::int32_t{stopping}; };

    httplib::Server server;
    server.set_payload_max_length(std::size_t{64} << 20);
    server.Get("/", [&](const httplib::Request&, httplib::Response& response) {
        response.set_content(std::string(tw_system(bundle.get())) + " " + tw_digest(bundle.get()) + ", tilewright " + tw_version() + "\n", "text/plain");
    });
    // read piece by piece, because curl calls any data a form, and of a form cpp-httplib itself takes 8 KiB
    server.Post("/", [&](const httplib::Request&, httplib::Response& response, const httplib::ContentReader& read) {
        std::string file;
        if (!read([&](const char* data, std::size_t size) { return file.append(data, size), true; })) return;
        try {
            tw_image in;
            auto pixels = decoded(file, in);
            response.set_content(encoded(*bundle.restore(in, options).get()), "image/png");
        } catch (const tilewright::Error& error) {
            response.status = status_of(error.status);
            response.set_content(std::string(error.what()) + "\n", "text/plain");
        } catch (const Bad& error) {
            response.status = 422;
            response.set_content(std::string(error.what()) + "\n", "text/plain");
        }
    });
    int port = count == 3 ? std::stoi(words[2]) : 8080;
    if (port) {
        if (!server.bind_to_port("127.0.0.1", port)) return std::cerr << "port " << port << " is taken\n", TW_ENVIRONMENT;
    } else {
        port = server.bind_to_any_port("127.0.0.1");
    }
    std::thread waiting([&] {
        int signal = 0;
        sigwait(&signals, &signal);
        stopping = 1;
        server.stop();
    });
    std::cout << "listening on http://127.0.0.1:" << port << std::endl;
    server.listen_after_bind();
    waiting.join();
} catch (const tilewright::Error& error) {
    std::cerr << error.what() << "\n";
    return error.status;
}
