package luks

import (
	"context"
	"crypto/hmac"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"hash"
	"math"
	"sync"
	"time"
)

// derive returns n bytes derived from secret with PBKDF2 (RFC 8018, 5.2). Unlike the standard library's, it ends when
// ctx does, and it computes the blocks of the result concurrently.
func derive(ctx context.Context, newHash func() hash.Hash, secret, salt []byte, iterations uint32, n int) ([]byte, error) {
	size := newHash().Size()
	blocks := (n + size - 1) / size
	key := make([]byte, blocks*size)
	errs := make([]error, blocks)
	var all sync.WaitGroup
	for i := range blocks {
		all.Go(func() {
			errs[i] = deriveBlock(ctx, hmac.New(newHash, secret), salt, uint32(i+1), iterations, key[i*size:(i+1)*size])
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		clear(key)
		return nil, context.Cause(ctx)
	}
	clear(key[n:])
	return key[:n], nil
}

// deriveBlock computes block number i, from 1, of a derived key.
func deriveBlock(ctx context.Context, mac hash.Hash, salt []byte, i, iterations uint32, block []byte) error {
	const between = 1 << 12 // iterations between two looks at ctx: below a millisecond
	mac.Write(salt)
	mac.Write(binary.BigEndian.AppendUint32(nil, i))
	u := mac.Sum(nil)
	defer clear(u)
	copy(block, u)
	for k := uint32(1); k < iterations; k++ {
		if k%between == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		mac.Reset()
		mac.Write(u)
		u = mac.Sum(u[:0])
		subtle.XORBytes(block, block, u)
	}
	return ctx.Err()
}

// calibrate returns how many iterations it takes to spend d on deriving n bytes, one block after the other. It
// measures for less than half a second, several times, and believes the fastest: others that use the machine must not
// weaken the key.
func calibrate(ctx context.Context, newHash func() hash.Hash, n int, d time.Duration) (uint32, error) {
	const (
		probe = 20 * time.Millisecond
		tries = 8
	)
	var fastest float64 // iterations per second
	for iterations, try := uint32(1<<12), 0; try < tries; {
		start := time.Now()
		if _, err := derive(ctx, newHash, make([]byte, saltBytes), make([]byte, saltBytes), iterations, 1); err != nil {
			return 0, err
		}
		took := time.Since(start)
		if took < probe && iterations < MaxIterations {
			iterations *= 2
			continue
		}
		fastest = max(fastest, float64(iterations)/took.Seconds())
		try++
	}
	size := newHash().Size()
	blocks := (n + size - 1) / size
	count := fastest * d.Seconds() / float64(blocks)
	return uint32(math.Min(math.Max(count, MinIterations), MaxIterations)), nil
}
