package format

import "encoding/binary"

// Refcount reads refcount i of a refcount block, or of a whole number of bytes from one. Widths of 8 bits and more
// are big-endian; narrower ones fill each byte from the least significant bit up (specification, "Refcount blocks").
func Refcount(block []byte, order uint32, i uint64) uint64 {
	switch order {
	case 0, 1, 2:
		width := uint(1) << order
		perByte := uint64(8 / width)
		return uint64(block[i/perByte]>>(uint(i%perByte)*width)) & (1<<width - 1)
	case 3:
		return uint64(block[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(block[i*2:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(block[i*4:]))
	default:
		return binary.BigEndian.Uint64(block[i*8:])
	}
}

// PutRefcount sets refcount i of a refcount block to v, which must fit the width.
func PutRefcount(block []byte, order uint32, i, v uint64) {
	switch order {
	case 0, 1, 2:
		width := uint(1) << order
		perByte := uint64(8 / width)
		shift := uint(i%perByte) * width
		mask := byte(1<<width-1) << shift
		block[i/perByte] = block[i/perByte]&^mask | byte(v)<<shift&mask
	case 3:
		block[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(block[i*2:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(block[i*4:], uint32(v))
	default:
		binary.BigEndian.PutUint64(block[i*8:], v)
	}
}
