// Package qcow reads and writes qcow2 images, versions 2 and 3, any cluster size and refcount width, with everything that QEMU writes:
// backing chains, internal snapshots, compressed clusters, encryption, external data files, extended L2 entries, bitmaps.
//
//	f, err := storage.Create("disk.qcow2")
//	err = qcow.Create(f, qcow.CreateOptions{Size: 10 << 30})
//	img, err := qcow.Open(f, qcow.Options{})
//	_, err = img.WriteAt(p, off)
//	err = img.Flush()
//	err = img.Close()
//
// # What a crash leaves
//
// A request that was acknowledged is in the file: guest data and tables are written through, nothing dirty is held in
// memory, but for links that are in the journal too, if there is one. So a killed process loses nothing. A power loss may lose what was not flushed, sector by sector, and
// nothing else; the tables it leaves are valid, and at worst some clusters are allocated that no table mentions. How:
//
//   - New clusters come from a reserve (allocator). For those in it, the refcount of 1 and the zeroes they hold are durable already.
//     So linking one needs no sync: with the link on disk, the guest sees zeroes or what it wrote, never what
//     another guest cluster held before. One sync fills the reserve, with few clusters for who needs few and with up to
//     256 MiB for who needs many; it runs in the background while half of the reserve is left.
//   - Where the guest reads something else than zeroes before a write, the new cluster gets that too, in the same write, and a
//     sync comes before the link (remap). With a journal the link is held back instead, in memory and in the journal, until a flush has made the
//     data durable (heldLinks). After a kill [Open] takes it from the journal; after a power loss there is none, and the guest
//     sees what was there before.
//   - A cluster that is unlinked stays in quarantine with its refcount and its content. The next
//     Flush makes the un-linking durable, waits until no request is under way that may have looked the cluster up before
//     (epochs), and lowers its refcount; one that nobody else refers to is punched first. Then it is free.
//   - What changes many tables at once builds copies of them aside, refcounts included, and writes the header's
//     table pointers, which share one sector, once (shadow).
//   - A metadata write that fails is undone. Where that fails too, or a sync fails, nobody knows what is on disk: the image is
//     poisoned, and every later change fails. Reads go on.
//
// # What a hostile image can't do
//
// Every table is bounded by the format's limits and by the length of the file when the image is opened; every L2 entry is
// checked when it is used; clusters with metadata are never written as guest data, nor freed, whatever an entry says, and an
// image that tries is marked corrupt. No file is opened because an image names it, unless the caller's Gate lets it through.
//
// # Concurrency
//
// A request decides under locks what to do, and does its data I/O under none. Requests that change L2 entries first claim
// their guest clusters (claims); those that only use data clusters need no claim, the epoch they run in keeps the cluster
// from being reused. Overlapping requests at the same time leave each sector with the value of one of them. Operations on the image as
// a whole (maintain) run one at a time; those under a shadow hold requests that change something up (freeze).
//
// Lock order, each taken before the ones after it: Image.maintenance, Image.maintaining, the freeze, recording.mu, claims, packing.mu,
// Image.newTable, allocator.mu, Image.headerMu, tableSlice.mu, heldLinks.mu; and these, under which nothing else is locked: bitmaps.mu, tableCache.mu,
// Image.l1mu, metadataMap.mu, quarantine.mu, groupSync.mu, CacheBudget.mu. A fill of the reserve syncs under none of these, but who waits for it may hold all before
// allocator.mu. Inside an epoch nothing waits for epochs: Flush, Resize, Close and the like run outside.
package qcow
