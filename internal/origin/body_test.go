// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"bufio"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// A body that is moved ends where one that is read does, and an earlier end is an error.
func TestResponseBodyMoves(t *testing.T) {
	t.Parallel()
	b := &ResponseBody{Body: h1.Body{R: bufio.NewReader(strings.NewReader("")), Remaining: 10}}
	for _, step := range []struct {
		most int64 // that Move asks for
		n    int   // that it gets
		err  error
		want error
	}{
		{10, 0, errors.ErrUnsupported, errors.ErrUnsupported},
		{10, 4, nil, nil},
		{6, 0, io.EOF, io.ErrUnexpectedEOF},
		{6, 6, nil, io.EOF},
	} {
		n, err := b.Move(func(most int64) (int, error) {
			if most != step.most {
				t.Errorf("Move asks for %d bytes, want %d", most, step.most)
			}
			return step.n, step.err
		})
		if n != step.n || err != step.want || b.Ended != (err == io.EOF) {
			t.Errorf("%d bytes, %v, ended: %t, want %d and %v", n, err, b.Ended, step.n, step.want)
		}
	}
}
