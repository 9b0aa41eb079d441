// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import (
	"errors"
	"io"
	"testing"
)

// A copy ends after a failure or when no more is wanted, which a read without bytes may say. What
// came with the last read is passed on.
func TestCopy(t *testing.T) {
	failed := errors.New("failed")
	for name, row := range map[string]struct {
		reads    []string // the last one comes with readErr
		readErr  error
		writeErr error // of the second write
		least    int   // of a read after which more is wanted
		want     string
	}{
		"to the end":            {[]string{"a", "", "b", "c"}, io.EOF, nil, 0, "abc"},
		"a failure of reading":  {[]string{"a", "b"}, failed, nil, 0, "ab"},
		"a failure of writing":  {[]string{"a", "b", "c"}, io.EOF, failed, 0, "ab"},
		"until nothing arrives": {[]string{"a", "b", "", "c"}, nil, nil, 1, "ab"},
	} {
		t.Run(name, func(t *testing.T) {
			got, i := "", 0
			readErr, writeErr := Copy(make([]byte, 8), func(p []byte) (n int, err error) {
				n = copy(p, row.reads[i])
				if i++; i == len(row.reads) {
					err = row.readErr
				}
				return n, err
			}, func(p []byte) error {
				if got += string(p); len(got) == 2 {
					return row.writeErr
				}
				return nil
			}, func(n int) bool { return n >= row.least })
			if row.writeErr != nil {
				row.readErr = nil
			}
			if got != row.want || readErr != row.readErr || writeErr != row.writeErr {
				t.Errorf("copied %q, %v, %v; want %q, %v, %v", got, readErr, writeErr, row.want, row.readErr, row.writeErr)
			}
		})
	}
}
