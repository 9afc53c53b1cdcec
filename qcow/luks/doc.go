// Package luks holds the keys and the ciphers of encrypted qcow2 images: the LUKS1 header that an image of encryption
// method 2 embeds (LUKS1 On-Disk Format Specification, version 1.2.3), and the AES of method 1. It works on byte
// slices and never on a file, and it takes a LUKS1 header from anywhere, not only from an image.
//
// # Concepts
//
// A random master key encrypts the disk. Each of eight key slots can hold the master key encrypted with a key that is
// derived from a passphrase (PBKDF2), so that an image may have several passphrases and change them without being
// written again. What a slot stores, its key material, is the master key split into stripes, all of which are needed
// to join it again: overwriting any part of them destroys the slot. A digest in the header tells a right master key
// from a wrong one, and with it a right passphrase.
//
// A header here is the slice of bytes that starts with the LUKS magic and reaches up to the payload, key material
// included. In a qcow2 image it is what the full disk encryption header pointer (extension 0x0537be77) points to. All
// offsets are relative to its start; those in errors too.
//
// # Sector numbers
//
// A [Cipher] encrypts sectors of 512 bytes; what it makes of them depends on their number. Which number, is for the
// caller to know:
//
//	qcow2, method 2 (LUKS)   host offset of the sector in the image file / 512
//	qcow2, method 1 (AES)    guest offset of the sector / 512
//	a LUKS device or file    offset from the start of the payload / 512
//
// # Order of changes
//
// [AddKey] and [RemoveKey] change nothing themselves. They return writes, to be made in their order with a sync after
// each. Whatever a crash leaves of them, every other key slot still opens, and the slot itself is either as it was,
// as it shall be, or inactive.
//
// # Hostile headers
//
// Every length and offset is checked before it is used, and no memory is taken beyond a small multiple of the header.
// The work that a header can demand is bounded too, but the bound is high ([MaxIterations] for each slot): whoever
// opens what others made passes a context with a deadline. Key material is overwritten in memory once it has served,
// as far as the language allows: the key schedules that a Cipher holds stay until they are collected.
package luks
