package e2e
import (
_ "github.com/chromedp/chromedp"
_ "github.com/chromedp/cdproto/emulation"
)
