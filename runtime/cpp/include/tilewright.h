/* Tilewright: restores images with a sealed bundle.

       #include <tilewright.h>

       tw_bundle *b = tw_open("out/hitoksr-demo", NULL);
       if (!b) { fprintf(stderr, "%s\n", tw_last_error(NULL)); return 1; }
       tw_image in = {width, height, TW_RGB8, 0, pixels}, out = {0};
       int32_t status = tw_restore(b, &in, NULL, &out);
       if (status) { fprintf(stderr, "%s\n", tw_last_error(b)); }
       tw_image_free(&out);
       tw_close(b);

   A bundle is a folder that `tilewright export build` makes. It holds networks and a program that says which network runs on
   which part of an image.

   Failure. A function that can fail returns a status, or NULL. `tw_last_error` then has one line: what is wrong, the value,
   what to do next. No function throws, and none ends the process.

   Threads. Every function may be called from any thread. Calls of `tw_restore` with one bundle run one after the other; a callback
   may call everything but `tw_restore` with its own bundle.

   Memory. The caller owns what it passes, and the library keeps no pointer to it after a call. Texts that a function returns
   are valid until the same thread calls the library again.

   Growth. The first member of `tw_params` and of `tw_options` is the size of the struct, which the functions of defaults fill
   in. So a program that was compiled with an older header works with a newer library. */
#ifndef TILEWRIGHT_H
#define TILEWRIGHT_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define TW_API __attribute__((visibility("default")))
#else
#define TW_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tw_bundle tw_bundle;

/* The exit codes of the command line. */
enum {
    TW_OK = 0,
    TW_ERROR = 1,       /* an internal error: please report it */
    TW_USAGE = 2,       /* a wrong argument */
    TW_BUNDLE = 3,      /* the bundle is damaged, changed or of an unknown format */
    TW_ENVIRONMENT = 4, /* no engine of the bundle can run on this machine */
    TW_RESOURCE = 5,    /* too little memory */
    TW_ACCURACY = 7,    /* a network gave a number that is not finite */
    TW_INPUT = 8,       /* a file of tensors cannot be used */
    TW_DEVICE = 9,      /* every device hangs */
    TW_CANCELLED = 130  /* a callback ended the call */
};

/* ---- opening a bundle */

typedef struct tw_params {
    size_t size;                /* of this struct */
    int32_t threads;            /* of a device; 0: the devices share the cores */
    int32_t low_memory;         /* 1: networks run on the mapped files, which takes less memory and more time */
    int32_t batch;              /* most tiles in a call of a network; 0: as the bundle says */
    const char *engine;         /* the name, precision or backend of the engines; NULL: the best that fit, see tw_engine_at */
    const char *weights_dir;    /* the folder of the weights, if they moved since the build; or NULL */
    const char *expect;         /* accept only the bundle whose digest begins so, with 12 digits or more; or NULL */
    /* Tilewright's own kernels, libtilewright_cpu.so. NULL: what the environment variable TILEWRIGHT_NATIVE names, or the
       file beside this library, if there is one. Empty: none. */
    const char *native_library;
    const char *devices;        /* "cpu:0,cpu:1": they run tiles at the same time, with the same pixels. "cuda:0": the first NVIDIA
                                   GPU, alone, with its own engines. NULL: "cpu:0" */
    int64_t memory_limit;       /* bytes that a restoration may need, with all that the process holds; 0: what is free */
    /* A call of a network that takes so many seconds hangs, and its device is not used again. 0: 20 times the slowest call of
       its kind, and a minute at least. */
    double deadline_s;
    int32_t fresh; /* 1: reads all files, also those whose digest is remembered */
} tw_params;

/* Writes the defaults of the first `size` bytes of a struct, and `size` as its size. */
TW_API void tw_fill_params(tw_params *params, size_t size);

static inline tw_params tw_default_params(void) {
    tw_params params;
    tw_fill_params(&params, sizeof params);
    return params;
}

/* Reads and checks a bundle, and opens its networks if they all fit in memory. The SHA-256 of every file is computed, also of the
   weights that its networks read, and remembered in the folder of docs/install.md, as long as the file does not change.
   `params` may be NULL. Returns NULL on failure: tw_last_error(NULL). */
TW_API tw_bundle *tw_open(const char *path, const tw_params *params);

/* Closes a bundle. NULL is accepted. A call that still runs ends as usual; every later one gets TW_USAGE. */
TW_API void tw_close(tw_bundle *bundle);

/* ---- pixels */

/* The number of channels, and 16 more if a channel has 16 bits, in the byte order of the machine. */
typedef enum tw_format {
    TW_GRAY8 = 1,
    TW_GRAYA8 = 2,
    TW_RGB8 = 3,
    TW_RGBA8 = 4,
    TW_GRAY16 = 17,
    TW_GRAYA16 = 18,
    TW_RGB16 = 19,
    TW_RGBA16 = 20
} tw_format;

/* Rows from top to bottom. */
typedef struct tw_image {
    int32_t width, height;
    tw_format format;
    size_t stride; /* bytes from one row to the next, any number; 0: the rows follow each other without a gap */
    void *pixels;  /* at any address */
} tw_image;

/* Frees the pixels that tw_restore allocated, and sets the image to zeros. NULL is accepted. */
TW_API void tw_image_free(tw_image *image);

/* ---- restoring */

/* A value of an argument, such as a strength or a prompt's token ids. tw_argument_at lists the arguments. */
typedef struct tw_value {
    const char *name;
    /* A number, the name of a choice, or the path of a safetensors file. For an input that is an array: its numbers with
       commas between them. NULL: the value is the array below. */
    const char *text;
    const char *dtype; /* float32, int64, ...: see docs/program.md */
    const int64_t *shape;
    size_t rank; /* the number of sizes in `shape` */
    const void *data;
} tw_value;

/* A part of the picture that is final. The pixels are valid during the callback. */
typedef struct tw_part {
    int32_t top, left;
    tw_image image; /* TW_RGB8 or TW_RGB16 */
} tw_part;

typedef struct tw_options {
    size_t size;      /* of this struct */
    int64_t seed;     /* of the noise, 0 to 4294967295 */
    int32_t tile;     /* side of the tiles, in pixels of the result; 0: as the bundle says */
    int32_t overlap;  /* width of the strip that tiles share; -1: as the bundle says */
    int32_t steps;    /* 0: as the bundle says */
    int32_t scale;    /* how many times the image is enlarged; 0: as the bundle says */
    const tw_value *values;
    size_t value_count;
    void *user; /* for the callbacks */
    /* The thread of tw_restore calls these functions, while other threads compute. `total` nodes are in a pass, one for each
       tile and step. */
    void (*on_progress)(const char *pass, int64_t done, int64_t total, void *user);
    /* If memory does not suffice for a tile, the image begins anew with smaller tiles, and all parts come again. */
    void (*on_part)(const tw_part *part, void *user);
    /* Asked before any work, and then about 20 times a second. Not 0: the networks stop, and tw_restore returns TW_CANCELLED. */
    int32_t (*is_cancelled)(void *user);
    /* Gets a line for each fault that the restoration has survived, such as a device that failed. */
    void (*on_note)(const char *note, void *user);
    int32_t bits; /* of a channel of the result, 8 or 16; 0: as many as the image has */
    /* Takes the colours of the input: "wavelet" its low frequencies, "adain" the mean and the spread of its channels. on_part
       gets the parts before that. "off", or NULL: none. */
    const char *color;
    int32_t jitter; /* 1: the borders of tiles move from step to step, where steps join tiles */
} tw_options;

TW_API void tw_fill_options(tw_options *options, size_t size); /* as tw_fill_params */

static inline tw_options tw_default_options(void) {
    tw_options options;
    tw_fill_options(&options, sizeof options);
    return options;
}

/* Restores an image. The result has the format of `in`, with `bits` bits. With out->pixels NULL, the library allocates them, and
   tw_image_free frees them. Otherwise `out` describes memory of the caller, and its width, height and format must be those of the result.
   On failure `out` stays as it was, but memory of the caller may be written to. `options` may be NULL. */
TW_API int32_t tw_restore(tw_bundle *bundle, const tw_image *in, const tw_options *options, tw_image *out);

/* The bytes of memory that tw_restore would need for an image of this size, with all that the process holds. It refuses images
   that need more than there is. `options` may be NULL. */
TW_API int32_t tw_needed_bytes(tw_bundle *bundle, int32_t width, int32_t height, const tw_options *options, int64_t *bytes);

/* ---- what a bundle is */

TW_API const char *tw_system(tw_bundle *bundle); /* "hitoksr"; NULL on failure */
TW_API const char *tw_digest(tw_bundle *bundle); /* the SHA-256 of bundle.json; NULL on failure */
TW_API int32_t tw_scale(tw_bundle *bundle);      /* 0 on failure */

typedef struct tw_argument {
    const char *name;
    const char *kind;  /* words, tensors, number, integer, choice */
    const char *takes; /* "a number from 0 to 1" */
    const char *help;
    int32_t needed; /* 1: it has no default */
} tw_argument;

TW_API size_t tw_argument_count(tw_bundle *bundle);
TW_API int32_t tw_argument_at(tw_bundle *bundle, size_t index, tw_argument *argument);

TW_API const char *tw_devices(tw_bundle *bundle); /* "cpu:0,cpu:1"; NULL on failure */

/* The engines of the networks, and why each of them was not chosen. */
typedef struct tw_engine {
    const char *component; /* the network */
    const char *name;      /* "ort-float32" */
    const char *reason;    /* why this machine cannot run it, or why another one is better; empty: it was chosen */
} tw_engine;

TW_API size_t tw_engine_count(tw_bundle *bundle);
TW_API int32_t tw_engine_at(tw_bundle *bundle, size_t index, tw_engine *engine);

/* ---- errors and versions */

/* The last failure of a bundle, or with NULL of this thread; an empty text if there was none. Never NULL. */
TW_API const char *tw_last_error(tw_bundle *bundle);

/* The status of the last failure of this thread; TW_OK if there was none. It tells why tw_open returned NULL. */
TW_API int32_t tw_last_status(void);

/* Tilewright's version and ONNX Runtime's: "0.1.0, onnxruntime 1.31.1". */
TW_API const char *tw_version(void);

#ifdef __cplusplus
}
#endif

#endif
