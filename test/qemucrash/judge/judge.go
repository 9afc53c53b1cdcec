package judge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Options tune a judgement.
type Options struct {
	States int    // how many to draw
	Seed   uint64 // of the enumeration and of the draw
	Dir    string // where states are put together
	// Keep is a directory for the first state of each kind that must not be, with its images, in a folder of its own; "" for
	// none.
	Keep string
}

// Judge draws states of a trial and says what they are like. It needs qemu-img and qemu-io. It fails only when it could
// not do its work.
func Judge(ctx context.Context, t *Trial, o Options) (*Result, error) {
	expected, err := expectations(ctx, t, o.Dir)
	if err != nil {
		return nil, err
	}
	p := newPopulation(t, o.Seed)
	samples, total := p.sample(o.States, o.Seed)
	verdicts := make([]*judged, len(samples))
	if err := inParallel(ctx, t, o.Dir, p, samples, func(i int, s *sampled, seen *observation) {
		verdicts[i] = judgeOne(expected, s, seen)
	}); err != nil {
		return nil, err
	}
	r := &Result{Operation: t.Operation, Shape: t.Shape, Log: count(t.Ops), Possible: total, Findings: map[string]Count{}}
	examples := map[string]*sampled{}
	for i, s := range samples {
		r.add(s, verdicts[i], examples)
	}
	if o.Keep == "" {
		return r, nil
	}
	return r, keep(filepath.Join(o.Keep, t.Operation+"-"+t.Shape), t, p, r.Examples, examples)
}

// expectations looks at the images before and after the operation.
func expectations(ctx context.Context, t *Trial, dir string) (_ []*expectation, err error) {
	b, err := newBench(dir, t)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	var initial, final [][]byte
	for _, image := range t.Images {
		initial, final = append(initial, image.Initial), append(final, image.Final)
	}
	before, err := b.read(ctx, initial)
	if err != nil {
		return nil, err
	}
	after, err := b.read(ctx, final)
	if err != nil {
		return nil, err
	}
	var expected []*expectation
	for i, image := range t.Images {
		expected = append(expected, &expectation{rule: image.Rule, before: before[i], after: after[i]})
	}
	if t.Requests != nil {
		expected[0].history = newHistory(before[0].disk, t.Requests)
	}
	return expected, nil
}

// inParallel looks at every sample and calls f with its number, concurrently.
func inParallel(ctx context.Context, t *Trial, dir string, p *population, samples []*sampled, f func(int, *sampled, *observation)) error {
	type job struct {
		number   int
		sample   *sampled
		contents [][]byte
	}
	group, ctx := errgroup.WithContext(ctx)
	jobs := make(chan job)
	group.Go(func() error {
		defer close(jobs)
		number := 0
		for s, contents := range p.contents(samples) {
			select {
			case jobs <- job{number, s, contents}:
			case <-ctx.Done():
				return ctx.Err()
			}
			number++
		}
		return nil
	})
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() (err error) {
			b, err := newBench(dir, t)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
			for j := range jobs {
				seen, err := b.observe(ctx, j.contents)
				if err != nil {
					return fmt.Errorf("%s: %w", j.sample.states[0].Name, err)
				}
				f(j.number, j.sample, seen)
			}
			return nil
		})
	}
	return group.Wait()
}

// judged is what is to be said of the states that have the same contents.
type judged struct {
	*observation
	wrong int     // how many of them have wrong data
	fault Example // of the first of these
}

func judgeOne(expected []*expectation, s *sampled, seen *observation) *judged {
	j := &judged{observation: seen}
	for i := range s.states {
		fault := seen.unread
		for k, v := range seen.views {
			if fault == "" {
				fault = expected[k].fault(v, &s.states[i])
			}
		}
		if fault == "" {
			continue
		}
		if j.wrong == 0 {
			j.fault = Example{State: s.states[i].Name, What: fault}
		}
		j.wrong++
	}
	seen.views = nil // they are large
	return j
}

const mostText = 4 << 10 // bytes of what is said of an example

// add counts what was said of a sample.
func (r *Result) add(s *sampled, j *judged, examples map[string]*sampled) {
	n := len(s.states)
	r.States.add(n)
	r.QEMU.add(j.qemu, n)
	r.Own.add(j.own, n)
	if j.dirty {
		r.Dirty.add(n)
	}
	for kind := range j.kinds {
		c := r.Findings[kind.String()]
		c.add(n)
		r.Findings[kind.String()] = c
	}
	example := func(kind, state, what string) {
		if examples[kind] == nil {
			examples[kind] = s
			r.Examples = append(r.Examples, Example{Kind: kind, State: state, What: what[:min(len(what), mostText)]})
		}
	}
	name := s.states[0].Name
	if j.qemu >= corrupt || j.own >= corrupt {
		example("corrupt", name, j.details)
	}
	if (j.qemu >= corrupt) != (j.own >= corrupt) {
		r.Disagree.add(n)
		example("disagree", name, j.details)
	}
	if j.wrong > 0 {
		r.WrongData.add(j.wrong)
		example("wrong-data", j.fault.State, j.fault.What)
	}
	if j.wrong < n && j.later != "" {
		r.WrongLater.add(n - j.wrong)
		example("wrong-later", name, j.later)
	}
}

func count(ops []storage.Op) (l Log) {
	for _, op := range ops {
		switch op.Kind {
		case storage.OpWrite, storage.OpWriteSync:
			l.Writes++
		case storage.OpPunch:
			l.Punches++
		case storage.OpTruncate, storage.OpAllocate:
			l.Truncates++
		case storage.OpSync:
			l.Syncs++
		case storage.OpMark:
		}
	}
	return l
}
