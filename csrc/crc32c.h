/* crc32c.h: the checksum of TensorFlow checkpoints.
 *
 * CRC-32C (Castagnoli, RFC 3720 appendix B.4): reflected polynomial 0x82F63B78, start and end inverted.
 */
#ifndef FB_CRC32C_H
#define FB_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Of size bytes, any alignment. Re-entrant; takes 8 KB of stack. */
uint32_t fb_crc32c(const void *data, size_t size);

#endif
