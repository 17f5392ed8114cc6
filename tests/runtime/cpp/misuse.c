/* The header as C17, and its functions used wrongly: each gives a status and a line, and none ends the process.
   With a bundle that takes any image: misuse BUNDLE. Prints each status and line. */
#include <tilewright.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

static void expect(const char *what, int32_t right, int32_t status, const char *part) {
    const char *told = tw_last_error(NULL);
    int fine = status == right && (status == TW_OK || (strstr(told, part) && !strchr(told, '\n')));
    failures += !fine;
    printf("%s%s: %d %s\n", fine ? "" : "WRONG ", what, (int)status, status ? told : "");
}

static int32_t stop(void *user) { return *(const int *)user; }
static void count_part(const tw_part *part, void *user) { *(int *)user += part->image.width * part->image.height; }

static void close_it(const tw_part *part, void *user) {
    (void)part;
    tw_close(*(tw_bundle **)user);
}
static int32_t inner = -1;
static void restore_again(const char *pass, int64_t done, int64_t total, void *user) {
    static uint8_t pixels[3];
    tw_image in = {1, 1, TW_RGB8, 0, pixels}, out = {0};
    (void)pass, (void)done, (void)total;
    inner = tw_restore(*(tw_bundle **)user, &in, NULL, &out);
}

int main(int count, char **words) {
    uint8_t pixels[8 * 8 * 3] = {0}, wide[8 * 40] = {0};
    tw_image in = {8, 8, TW_RGB8, 0, pixels}, out = {0}, again = {0};
    tw_options options = tw_default_options();
    tw_params params = tw_default_params();
    tw_value value = {"nothing", "1", NULL, NULL, 0, NULL};
    tw_argument argument;
    tw_engine engine;
    int64_t needed = 0;
    int stopped = 1, parts = 0;
    if (count != 2) return 2;

    memset(&params, 7, sizeof params); /* as a program that was compiled with a shorter struct */
    tw_fill_params(&params, offsetof(tw_params, engine));
    if (params.size != offsetof(tw_params, engine) || params.threads || !params.engine) ++failures, printf("WRONG defaults of a shorter struct\n");
    memset(&options, 7, sizeof options);
    tw_fill_options(&options, offsetof(tw_options, values));
    if (options.overlap != -1 || options.seed || !options.values) ++failures, printf("WRONG defaults of shorter options\n");
    tw_fill_params(NULL, sizeof params);
    params = tw_default_params();
    options = tw_default_options();
    expect("a NULL path", TW_USAGE, tw_open(NULL, NULL) ? 0 : tw_last_status(), "path is NULL");
    expect("no bundle", TW_BUNDLE, tw_open("/nowhere", NULL) ? 0 : tw_last_status(), "no bundle.json there");
    params.size = 4;
    expect("a params without size", TW_USAGE, tw_open(words[1], &params) ? 0 : tw_last_status(), "params.size 4");
    params = tw_default_params();
    params.expect = "0123456789ab";
    expect("another digest", TW_BUNDLE, tw_open(words[1], &params) ? 0 : tw_last_status(), "is not the expected");
    params.expect = NULL;
    params.devices = "cpu:x";
    expect("an unknown device", TW_USAGE, tw_open(words[1], &params) ? 0 : tw_last_status(), "device 'cpu:x' is unknown");
    params.devices = NULL;
    params.memory_limit = -1;
    expect("a negative limit", TW_USAGE, tw_open(words[1], &params) ? 0 : tw_last_status(), "memory_limit=-1");
    params.memory_limit = 0;
    params.deadline_s = -1;
    expect("a negative deadline", TW_USAGE, tw_open(words[1], &params) ? 0 : tw_last_status(), "deadline_s=-1");
    params.deadline_s = 1e300;
    expect("an endless deadline", TW_USAGE, tw_open(words[1], &params) ? 0 : tw_last_status(), "deadline_s=1e+300");
    params.deadline_s = 0;
    params.expect = "";
    expect("no digest", TW_USAGE, tw_open(words[1], &params) ? 0 : tw_last_status(), "is no digest");
    params.expect = NULL;
    params.engine = "fast";
    expect("an unknown engine", TW_USAGE, tw_open(words[1], &params) ? 0 : tw_last_status(), "is none of this bundle's engines");
    expect("a NULL bundle", TW_USAGE, tw_restore(NULL, &in, NULL, &out), "NULL");

    tw_bundle *bundle = tw_open(words[1], NULL);
    if (!bundle) return printf("%s\n", tw_last_error(NULL)), 1;
    expect("a NULL image", TW_USAGE, tw_restore(bundle, NULL, NULL, &out), "in is NULL");
    expect("no output", TW_USAGE, tw_restore(bundle, &in, NULL, NULL), "out is NULL");
    in.pixels = NULL;
    expect("NULL pixels", TW_USAGE, tw_restore(bundle, &in, NULL, &out), "pixels are NULL");
    in.pixels = pixels;
    in.width = 0;
    expect("no width", TW_USAGE, tw_restore(bundle, &in, NULL, &out), "0x8 and has no pixels");
    in.width = 8;
    in.stride = 23;
    expect("a short stride", TW_USAGE, tw_restore(bundle, &in, NULL, &out), "stride 23 is shorter than a row of 24");
    in.stride = 0;
    in.format = (tw_format)7;
    expect("an unknown format", TW_USAGE, tw_restore(bundle, &in, NULL, &out), "format 7");
    in.format = (tw_format)21;
    expect("an unknown deep format", TW_USAGE, tw_restore(bundle, &in, NULL, &out), "format 21");
    in.format = TW_RGB16;
    in.stride = 47;
    expect("a short stride of 16 bits", TW_USAGE, tw_restore(bundle, &in, NULL, &out), "stride 47 is shorter than a row of 48");
    in.stride = 0;
    in.format = TW_RGB8;
    options.bits = 12;
    expect("an unknown depth", TW_USAGE, tw_restore(bundle, &in, &options, &out), "bits=12");
    options = tw_default_options();
    in.width = in.height = 1 << 20;
    expect("a huge image", TW_USAGE, tw_restore(bundle, &in, NULL, &out), "over the limit");
    in.width = in.height = 8;
    options.seed = -1;
    expect("a negative seed", TW_USAGE, tw_restore(bundle, &in, &options, &out), "seed=-1");
    options = tw_default_options();
    options.tile = 13;
    expect("an odd tile", TW_USAGE, tw_restore(bundle, &in, &options, &out), "tile=13");
    options = tw_default_options();
    options.values = &value;
    options.value_count = 1;
    expect("an unknown argument", TW_USAGE, tw_restore(bundle, &in, &options, &out), "unknown argument 'nothing'");
    options = tw_default_options();
    options.is_cancelled = stop;
    options.user = &stopped;
    expect("a cancelled call", TW_CANCELLED, tw_restore(bundle, &in, &options, &out), "cancelled");
    expect("no place for a number", TW_USAGE, tw_needed_bytes(bundle, 8, 8, NULL, NULL), "bytes is NULL");
    expect("a size of nothing", TW_USAGE, tw_needed_bytes(bundle, 0, 8, NULL, &needed), "0x8 is no image size");
    expect("an engine too many", TW_USAGE, tw_engine_at(bundle, 1000, &engine), "index 1000");
    expect("no engine", TW_USAGE, tw_engine_at(bundle, 0, NULL), "engine is NULL");
    expect("an index too large", TW_USAGE, tw_argument_at(bundle, 1000, &argument), "index 1000");
    if (out.pixels) ++failures;

    options = tw_default_options();
    options.on_part = count_part;
    options.user = &parts;
    expect("a good call", TW_OK, tw_restore(bundle, &in, &options, &out), "");
    if (parts != out.width * out.height || out.width != 8 * tw_scale(bundle)) ++failures, printf("WRONG parts\n");
    for (int y = 0; y < 8; ++y) memcpy(wide + 40 * y, pixels + 24 * y, 24);
    in.pixels = wide;
    in.stride = 40;
    again = out;
    again.stride = (size_t)out.width * 3 + 5;
    again.pixels = calloc(again.stride, (size_t)out.height);
    again.width -= 1;
    expect("an output of another size", TW_USAGE, tw_restore(bundle, &in, NULL, &again), "the result is");
    again.width += 1;
    expect("memory of the caller, with strides", TW_OK, tw_restore(bundle, &in, NULL, &again), "");
    for (int y = 0; y < out.height; ++y)
        if (memcmp((uint8_t *)again.pixels + again.stride * (size_t)y, (uint8_t *)out.pixels + (size_t)out.width * 3 * (size_t)y, (size_t)out.width * 3)) ++failures, printf("WRONG row %d\n", y);
    free(again.pixels);
    tw_image_free(&out);
    tw_image_free(&out);
    tw_image_free(NULL);

    options = tw_default_options();
    options.user = &bundle;
    options.on_progress = restore_again;
    expect("a call within a callback", TW_OK, tw_restore(bundle, &in, &options, &out), "");
    if (inner != TW_USAGE) ++failures, printf("WRONG inner call %d\n", (int)inner);
    tw_image_free(&out);
    options = tw_default_options();
    options.user = &bundle;
    options.on_part = close_it;
    expect("a bundle that is closed in use", TW_OK, tw_restore(bundle, &in, &options, &out), "");
    tw_image_free(&out);
    expect("a closed bundle", TW_USAGE, tw_restore(bundle, &in, NULL, &out), "is closed");
    if (tw_system(bundle) || tw_devices(bundle) || tw_scale(bundle) || tw_argument_count(bundle) || tw_engine_count(bundle)) ++failures, printf("WRONG after close\n");
    tw_close(bundle);
    tw_close(NULL);
    printf("%s, %d wrong\n", tw_version(), failures);
    return failures ? 1 : 0;
}
