package interop_test

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// An ink is what requests write: the content of a file, again and again, as qemu-io -s has it. A shell can make the file too.
type ink struct {
	name    string
	content []byte
	command string // makes the file
}

// String is the name of the file, or nothing where a request writes nothing.
func (i *ink) String() string {
	if i == nil {
		return ""
	}
	return i.name
}

// fill writes the ink over p.
func (i *ink) fill(p []byte) {
	for len(p) > 0 {
		p = p[copy(p, i.content):]
	}
}

// inks returns noise, which does not compress, and numbers, which do. The lengths have no common factor with those of clusters, so that
// neighbouring clusters differ.
var inks = sync.OnceValue(func() (list []*ink) {
	for i, length := range []int{20011, 33347, 65537, 131101, 49999, 92821} {
		list = append(list, noiseInk(byte(i+1), length))
	}
	for i, last := range []int{4999, 7001, 12007, 17011} {
		var b strings.Builder
		for n := 1000 * i; n <= last; n++ {
			fmt.Fprintln(&b, n)
		}
		list = append(list, &ink{
			name: fmt.Sprintf("numbers%d", i), content: []byte(b.String()),
			command: fmt.Sprintf("seq %d %d > numbers%d", 1000*i, last, i),
		})
	}
	return list
})

// noiseInk returns what AES makes of zeroes with a key of one byte, repeated.
func noiseInk(key byte, length int) *ink {
	k := strings.Repeat(string(rune(key)), aes.BlockSize)
	block, err := aes.NewCipher([]byte(k))
	if err != nil {
		panic(err)
	}
	b := make([]byte, length)
	cipher.NewCTR(block, make([]byte, aes.BlockSize)).XORKeyStream(b, b)
	return &ink{
		name: fmt.Sprintf("noise%d", key), content: b,
		command: fmt.Sprintf("head -c %d /dev/zero | openssl enc -aes-128-ctr -K %x -iv %032x > noise%d", length, k, 0, key),
	}
}

// spill makes the files of all inks.
func spill(dir string) error {
	for _, i := range inks() {
		if err := os.WriteFile(filepath.Join(dir, i.name), i.content, 0o600); err != nil {
			return err
		}
	}
	return nil
}
