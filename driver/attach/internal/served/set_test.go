package served_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/served"
)

func claim(t *testing.T, s *served.Set[int], volumeID string) (release func()) {
	t.Helper()
	release, err := s.Claim(volumeID)
	if err != nil {
		t.Fatal(err)
	}
	return release
}

func TestClaim(t *testing.T) {
	var s served.Set[int]
	a := claim(t, &s, "a")
	if _, err := s.Claim("a"); !errors.Is(err, attach.ErrBusy) {
		t.Errorf("second claim: %v, want %v", err, attach.ErrBusy)
	}
	claim(t, &s, "b")()
	s.Put("a", 1)
	a()
	a = claim(t, &s, "a")
	if d, ok := s.Get("a"); d != 1 || !ok {
		t.Errorf("got %d, %v", d, ok)
	}
	s.Delete("a")
	if d, ok := s.Get("a"); ok {
		t.Errorf("got %d after delete", d)
	}
	a()
}

func TestClose(t *testing.T) {
	var s served.Set[int]
	a, b := claim(t, &s, "a"), claim(t, &s, "b")
	closed := make(chan []int)
	go func() { closed <- s.Close() }()
	for { // until Close has begun
		release, err := s.Claim("c")
		if errors.Is(err, attach.ErrClosed) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
	s.Put("a", 1)
	a()
	select {
	case got := <-closed:
		t.Fatalf("closed with %v while an operation was under way", got)
	default:
	}
	s.Put("b", 2)
	b()
	got := <-closed
	if slices.Sort(got); !slices.Equal(got, []int{1, 2}) {
		t.Errorf("closed with %v", got)
	}
	if again := s.Close(); len(again) > 0 {
		t.Errorf("closed again with %v", again)
	}
}
