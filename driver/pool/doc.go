// Package pool keeps volumes in a storage directory, which is the only source of truth: nothing is remembered anywhere
// else, and everything held in memory is rebuilt by reading it.
//
// # The directory
//
//	pool.json                 format version and pool id; the id is made once and is part of every volume handle
//	lock                      held by the one process that serves the directory
//	volumes/<id>/volume.json  the record of a volume: name, parameters, head image, what its filesystem went through
//	volumes/<id>/head.qcow2   its head image, where its data and its size are
//	layers/<id>/              (later) images frozen by a snapshot or a clone; a head, or another layer, names one as its
//	                          backing file by a relative path and with an explicit format. Immutable, counted by reading
//	snapshots/<id>/           (later) the record of a snapshot and the layer it keeps alive
//	tmp/                      what is being built and what is being removed; nothing here counts
//
// A record names its head image, so that a snapshot can put a new head in place by replacing the record.
// A record repeats nothing that the image says: size and cluster size are read from the image's header.
//
// # Crashes
//
// Whatever has several files is built in tmp, made durable there and put in place by one rename; it is removed
// by one rename into tmp. A record is replaced by a rename too. Every rename is followed by an fsync of the
// directories it touches before the operation succeeds. So a crash at any point leaves each volume as it was before the
// operation or as it is after, and Open has only to empty tmp. Growing a volume is one atomic switch in its image.
//
// What cannot be read is never removed and never in the way: a volume whose record or image is damaged answers every
// call with its error, is logged by Open, and is read again on each use, so that a repair needs no restart. The
// others do not notice. Only Delete removes it.
//
// # Names and ids
//
// A volume has a name, any text, given by who asks for it, and an id, made here from the name (for the eye) and random
// letters (so that no id is ever used twice, and a late retry of a deletion cannot hit a younger volume of the same
// name). Only ids that [ValidID] accepts ever reach a path, and all paths are resolved below an [os.Root].
//
// # Capacity
//
// The space that a volume could ever take, its data and all its tables when every byte is written, is its footprint. It
// is promised in full when the volume is created or grown, at once and before anything is written, and a promise that
// the filesystem cannot keep is refused with [ErrNoSpace]:
//
//	available = free bytes of the filesystem - Σ (footprint - bytes taken already) over all volumes
//
// Volumes are thin, but without overcommit no write ever fails because of another volume. What else fills the
// filesystem can still break the promise; then writes fail with ErrNoSpace, nothing is lost, and they go on when there
// is space again.
//
// # Locks
//
// Each volume has a lock that serializes its operations: held while its image is opened, closed, grown or removed,
// never while the image is read or written. The pool's mutex guards the maps and the promises, never across an
// operation that writes. A volume's lock is taken before the mutex, never after it; no operation takes two volumes'
// locks.
package pool
