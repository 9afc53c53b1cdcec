package qcow

import "encoding/binary"

// FilledByTakers makes whoever finds the reserve empty fill it, and nobody else: what an image does to its file then depends on the requests alone.
func FilledByTakers(o Options) Options {
	o.fillByTakers = true
	return o
}

// SealJournal makes every record in a journal valid.
func SealJournal(b []byte) {
	n := bankBytes(len(b))
	for i := range journalBanks {
		bank := b[i*n:][:n]
		for at := journalRecord; at < len(bank); at += journalRecord {
			if body := bank[at+8 : at+journalRecord]; binary.LittleEndian.Uint64(bank[at:]) != 0 {
				binary.LittleEndian.PutUint64(bank[at:], sealOf(body, binary.LittleEndian.Uint64(bank)))
			}
		}
	}
}
