// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package linebuffer

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A recorder keeps what each call of Write got.
type recorder struct {
	mu     sync.Mutex
	writes []string
	err    error // of each call
	takes  int   // how many bytes a call that fails writes
	closed int

	reports []string
}

func (r *recorder) report(err error, lost int) {
	r.reports = append(r.reports, fmt.Sprint(err, " ", lost))
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil || r.takes > 0 {
		p = p[:min(r.takes, len(p))]
	}
	r.writes = append(r.writes, string(p))
	return len(p), r.err
}

// fail makes writes fail from now on, or work again.
func (r *recorder) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = err
}

func (r *recorder) Close() error { r.closed++; return nil }

func (r *recorder) expect(t *testing.T, writes ...string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(r.writes, writes) {
		t.Errorf("written: %q, want %q", r.writes, writes)
	}
}

// buffering returns a Writer with a buffer.
func buffering(r *recorder, size int, delay time.Duration) *Writer {
	w := New(r, r.report)
	w.SetBuffer(size, delay)
	return w
}

// write writes lines, and returns the first error.
func write(t *testing.T, w *Writer, lines ...string) (err error) {
	t.Helper()
	for _, line := range lines {
		n, e := w.Write([]byte(line))
		if n != len(line) {
			t.Errorf("%q: took %d bytes", line, n)
		}
		if err == nil {
			err = e
		}
	}
	return err
}

func TestFullBuffer(t *testing.T) {
	for _, tc := range []struct {
		name          string
		lines, writes []string // the buffer has 10 bytes
	}{
		{"less", []string{"1234\n", "567\n"}, nil},
		{"exactly", []string{"1234\n", "5678\n"}, nil},
		{"one more", []string{"1234\n", "5678\n", "\n"}, []string{"1234\n5678\n"}},
		{"a line that does not fit", []string{"123456\n", "789\n", "0\n"}, []string{"123456\n"}},
		{"a line as long as the buffer", []string{"1\n", "123456789\n"}, []string{"1\n"}},
		{"a longer line", []string{"1\n", "1234567890\n", "2\n"}, []string{"1\n", "1234567890\n"}},
		{"a longer line first", []string{"1234567890\n", "2\n"}, []string{"1234567890\n"}},
		{"nothing", []string{"", "1\n", ""}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var r recorder
			w := buffering(&r, 10, time.Hour)
			if err := write(t, w, tc.lines...); err != nil {
				t.Error(err)
			}
			r.expect(t, tc.writes...)
			if err := w.Close(); err != nil || r.closed != 1 {
				t.Errorf("closed %d times: %v", r.closed, err)
			}
			if got, want := strings.Join(r.writes, ""), strings.Join(tc.lines, ""); got != want {
				t.Errorf("written in the end: %q, want %q", got, want)
			}
		})
	}
}

func TestDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		w := buffering(&r, 100, time.Second)
		time.Sleep(time.Hour) // an empty buffer is not written
		r.expect(t)
		_ = write(t, w, "1\n")
		time.Sleep(time.Second - 1)
		_ = write(t, w, "2\n") // does not prolong the delay of the first
		r.expect(t)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		r.expect(t, "1\n2\n")
		_ = write(t, w, "3\n")
		time.Sleep(time.Second)
		synctest.Wait()
		r.expect(t, "1\n2\n", "3\n")
	})
}

// A buffer that has been written because it was full has a new delay.
func TestDelayBeginsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		w := buffering(&r, 4, time.Second)
		_ = write(t, w, "1\n", "2\n")
		time.Sleep(time.Second / 2)
		_ = write(t, w, "3\n")
		r.expect(t, "1\n2\n")
		time.Sleep(time.Second/2 + 1)
		synctest.Wait()
		r.expect(t, "1\n2\n")
		time.Sleep(time.Second / 2)
		synctest.Wait()
		r.expect(t, "1\n2\n", "3\n")
	})
}

func TestSetBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		w := New(&r, r.report)
		_ = write(t, w, "1\n")
		r.expect(t, "1\n")
		w.SetBuffer(100, time.Second)
		_ = write(t, w, "2\n")
		time.Sleep(time.Second / 2)
		w.SetBuffer(100, time.Second) // changes nothing
		_ = write(t, w, "3\n")
		r.expect(t, "1\n")
		time.Sleep(time.Second / 2)
		synctest.Wait()
		r.expect(t, "1\n", "2\n3\n")
		_ = write(t, w, "4\n")
		w.SetBuffer(4, time.Hour)
		r.expect(t, "1\n", "2\n3\n", "4\n")
		_ = write(t, w, "5\n")
		time.Sleep(time.Minute)
		_ = write(t, w, "6\n", "7\n")
		r.expect(t, "1\n", "2\n3\n", "4\n", "5\n6\n")
		w.SetBuffer(0, 0)
		_ = write(t, w, "8\n")
		r.expect(t, "1\n", "2\n3\n", "4\n", "5\n6\n", "7\n", "8\n")
	})
}

func TestLinesAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		w := buffering(&r, 100, time.Second)
		_ = write(t, w, "1\n")
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		_ = write(t, w, "2\n")
		r.expect(t, "1\n", "2\n")
		time.Sleep(time.Hour)
		synctest.Wait()
		r.expect(t, "1\n", "2\n")
	})
}

// Failures are reported when they happen, once until writing works again, and the lines that could not be
// written do not stay in the buffer.
func TestErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := errors.New("disk full")
		r := recorder{err: full}
		w := buffering(&r, 4, time.Second)
		expect := func(when string, reports ...string) {
			t.Helper()
			r.mu.Lock()
			defer r.mu.Unlock()
			if !slices.Equal(r.reports, reports) {
				t.Errorf("%s: reported %q, want %q", when, r.reports, reports)
			}
			r.reports = nil
		}
		check := func(err error) {
			t.Helper()
			if err != nil {
				t.Error(err)
			}
		}
		check(write(t, w, "1\n", "2\n"))
		expect("nothing has been written")
		check(write(t, w, "3\n"))
		expect("when the buffer is full", "disk full 2")
		check(write(t, w, "4\n"))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		check(write(t, w, "5\n", "long line\n"))
		expect("while it fails")
		r.fail(nil)
		check(write(t, w, "6\n"))
		expect("nothing has been written again")
		time.Sleep(2 * time.Second)
		synctest.Wait()
		expect("when it works again", "<nil> 6")
		check(write(t, w, "7\n"))
		r.fail(full)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		expect("after the delay", "disk full 1")
		r.fail(nil)
		check(write(t, w, "8\n"))
		w.SetBuffer(8, time.Hour)
		expect("when the buffer changes", "<nil> 1")
		check(write(t, w, "9\n"))
		r.fail(full)
		w.SetBuffer(0, 0)
		expect("when the buffer ends", "disk full 1")
		if err := w.Close(); err != nil || r.closed != 1 {
			t.Errorf("closed %d times: %v", r.closed, err)
		}
		check(write(t, w, "10\n"))
		expect("after Close")
		r.fail(nil)
		check(write(t, w, "11\n"))
		expect("after Close, when it works again", "<nil> 2")
	})
}

// A write that ends in the middle of a line costs that line and those after it, and none later.
func TestShortWrites(t *testing.T) {
	for takes, want := range map[int]string{
		0:  "ok\n",
		1:  "1\nok\n",
		3:  "123\nok\n",
		4:  "123\nok\n",
		6:  "123\n45\nok\n",
		99: "123\n456\nok\n",
	} {
		for _, err := range []error{nil, errors.New("disk full")} {
			if takes == 0 && err == nil {
				continue // a recorder that takes everything
			}
			r := recorder{err: err, takes: takes}
			w := New(&r, r.report)
			_ = write(t, w, "123\n456\n")
			r.err, r.takes = nil, 0
			_ = write(t, w, "ok\n")
			if got := strings.Join(r.writes, ""); got != want {
				t.Errorf("%d bytes, %v: %q, want %q", takes, err, got, want)
			}
			lost := 0
			if len(r.reports) > 0 {
				lost, _ = strconv.Atoi(r.reports[len(r.reports)-1][len("<nil> "):])
			}
			if whole := strings.Count("123\n456\n"[:min(takes, 8)], "\n"); whole+lost != 2 {
				t.Errorf("%d bytes, %v: %d lines are whole, and the reports are %q", takes, err, whole, r.reports)
			}
		}
	}
}

// What ends a cut line is no line, and is not counted as lost when it cannot be written.
func TestLostAfterCutLine(t *testing.T) {
	full := errors.New("disk full")
	r := recorder{err: full, takes: len("123\n45")}
	w := New(&r, r.report)
	_ = write(t, w, "123\n456\n")
	r.takes = 0
	_ = write(t, w, "7\n", "8\n")
	r.err = nil
	_ = write(t, w, "ok\n")
	if want := []string{"disk full 1", "<nil> 3"}; !slices.Equal(r.reports, want) {
		t.Errorf("reported %q, want %q", r.reports, want)
	}
	if got, want := strings.Join(r.writes, ""), "123\n45\nok\n"; got != want {
		t.Errorf("written: %q, want %q", got, want)
	}
}

// Lines that were lost since the last report are reported when the buffer changes or ends, because there may be
// no later write that works.
func TestLostInTheEnd(t *testing.T) {
	for name, end := range map[string]func(w *Writer){
		"no buffer":      func(w *Writer) { w.SetBuffer(0, 0) },
		"another buffer": func(w *Writer) { w.SetBuffer(100, time.Hour) },
		"closed":         func(w *Writer) { _ = w.Close() },
		"all":            func(w *Writer) { w.SetBuffer(100, time.Hour); w.SetBuffer(0, 0); _ = w.Close() },
	} {
		r := recorder{err: errors.New("disk full")}
		w := buffering(&r, 4, time.Hour)
		for range 50 {
			_ = write(t, w, "1\n")
		}
		end(w)
		if want := []string{"disk full 2", "disk full 50"}; !slices.Equal(r.reports, want) {
			t.Errorf("%s: reported %q, want %q", name, r.reports, want)
		}
	}
	r := recorder{err: errors.New("disk full")}
	w := New(&r, r.report)
	_ = write(t, w, "1\n", "2\n")
	_ = w.Close()
	if want := []string{"disk full 1", "disk full 2"}; !slices.Equal(r.reports, want) {
		t.Errorf("closed without a buffer: reported %q, want %q", r.reports, want)
	}
}

// Every line arrives whole and once, and those of one goroutine in their order, whatever makes the
// buffer be written.
func TestConcurrency(t *testing.T) {
	var r recorder
	w := buffering(&r, 100, 50*time.Microsecond)
	const goroutines, lines = 8, 2000
	var group sync.WaitGroup
	for g := range goroutines {
		group.Go(func() {
			for i := range lines {
				_ = write(t, w, fmt.Sprintf("%d %s%d\n", g, strings.Repeat(" ", i%120), i))
			}
		})
	}
	group.Wait()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var next [goroutines]int
	for line := range strings.Lines(strings.Join(r.writes, "")) {
		var g, i int
		if _, err := fmt.Sscan(line, &g, &i); err != nil || i != next[g] {
			t.Fatalf("%q instead of line %d: %v", line, next[g], err)
		}
		next[g]++
	}
	for g, n := range next {
		if n != lines {
			t.Errorf("%d lines of goroutine %d", n, g)
		}
	}
}
