/* What the cards of the fake driver look like: read once from the environment (see __init__.py). */
#ifndef FAKE_CUDA_DEVICE_H
#define FAKE_CUDA_DEVICE_H
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define HANDLE ((void *)0x5000)
#define UNUSED __attribute__((unused))

static UNUSED const char *text_of(const char *name, const char *otherwise) {
  const char *found = getenv(name);
  return found ? found : otherwise;
}
static UNUSED long number_of(const char *name, long otherwise) {
  const char *found = getenv(name);
  return found && *found ? atol(found) : otherwise;
}
static UNUSED const char *card_name(void) { return text_of("FAKE_CUDA_NAME", "NVIDIA A100-SXM4-80GB"); }
static UNUSED size_t card_memory(void) { return (size_t)number_of("FAKE_CUDA_MEMORY_MIB", 81920) << 20; }
static UNUSED int capability(void) { return (int)number_of("FAKE_CUDA_CAPABILITY", 80); } /* 8.0 is 80 */
static UNUSED int processors(void) { return (int)number_of("FAKE_CUDA_PROCESSORS", 108); }
static UNUSED int driver_version(void) { return (int)number_of("FAKE_CUDA_VERSION", 13000); }
static UNUSED int cards_of_machine(void) { return (int)number_of("FAKE_CUDA_CARDS", 1); }

/* CUDA_VISIBLE_DEVICES as a list of numbers; ends at the first one that is no card, as CUDA does. */
static UNUSED int visible(int *cards, int most) {
  const char *list = getenv("CUDA_VISIBLE_DEVICES");
  int count = 0;
  if (!list) {
    for (; count < cards_of_machine() && count < most; count++) cards[count] = count;
    return count;
  }
  while (*list && count < most) {
    char *end;
    long card = strtol(list, &end, 10);
    if (end == list || card < 0 || card >= cards_of_machine()) break;
    cards[count++] = (int)card;
    if (*end != ',') break;
    list = end + 1;
  }
  return count;
}
static UNUSED int visible_count(void) { int cards[64]; return visible(cards, 64); }
static UNUSED int physical(int device) {
  int cards[64], count = visible(cards, 64);
  return device >= 0 && device < count ? cards[device] : -1;
}
static UNUSED void uuid_of(int card, unsigned char *bytes) {
  memset(bytes, 0xfa, 16);
  bytes[15] = (unsigned char)card;
}

/* Compute mode EXCLUSIVE_PROCESS: 0 where this process has the card, else the error devices-unavailable. */
static UNUSED int context_on(int device) {
  static int locked[64];
  const char *folder = getenv("FAKE_CUDA_EXCLUSIVE");
  int card = physical(device);
  char path[4096];
  if (card < 0) return visible_count() ? 101 : 100;
  if (!folder || locked[card]) return 0;
  snprintf(path, sizeof path, "%s/card-%d", folder, card);
  int file = open(path, O_CREAT | O_RDWR, 0600);
  if (file < 0 || flock(file, LOCK_EX | LOCK_NB)) return 46;
  locked[card] = 1; /* the file stays open, and locked, as long as the process lives */
  return 0;
}
#endif
