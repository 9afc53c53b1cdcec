package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"
)

// measureAll goes through all rows and servers, round after round.
func (r *report) measureAll(ctx context.Context, l *laboratory) error {
	begin := time.Now()
	for round := range l.rounds {
		if spent := time.Since(begin); round > 0 && spent+spent/time.Duration(round) > l.limit {
			r.Notes = append(r.Notes, fmt.Sprintf("%d of %d rounds fitted into %v", round, l.rounds, l.limit))
			break
		}
		for i := range r.Rows {
			row := &r.Rows[i]
			for turn := range r.Servers {
				which := (turn + round + i) % len(r.Servers) // who is first takes turns, too
				s, c := r.Servers[which], &row.Cells[which]
				if c.Absent || c.Error != "" {
					continue
				}
				progress("round %d of %d, row %d of %d: %s, %s", round+1, l.rounds, i+1, len(r.Rows), row, s.Name)
				sample, err := l.measure(ctx, row, s)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err != nil {
					c.Error = strings.ReplaceAll(err.Error(), l.images.dir+"/", "")
					continue
				}
				c.Samples = append(c.Samples, sample)
			}
		}
		r.Rounds = round + 1
		progress("round %d of %d ended after %v\n", r.Rounds, l.rounds, time.Since(begin).Round(time.Second))
		if l.json != "" && l.json != "-" {
			if err := r.save(l.json); err != nil {
				return err
			}
		}
	}
	return nil
}

// progress says what is being done: to a terminal, where each line overwrites the one before, or, if it ends one, to anybody.
func progress(format string, args ...any) {
	info, err := os.Stderr.Stat()
	switch terminal := err == nil && info.Mode()&os.ModeCharDevice != 0; {
	case terminal:
		fmt.Fprintf(os.Stderr, "\r\033[K"+format, args...)
	case strings.HasSuffix(format, "\n"):
		fmt.Fprintf(os.Stderr, format, args...)
	}
}
